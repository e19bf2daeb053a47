# log-likelihoods of choices over /v1/completions, replies over /v1/chat/completions: tasks of two questions each
mkdir -p tasks
cat >questions.jsonl <<END
{"question": "The capital of France is", "choices": [" Paris", " green"], "answer": 0}
{"question": "The sky is", "choices": [" a fish", " blue"], "answer": 1}
END
cat >tasks/choices.yaml <<END
task: ours_choices
dataset_path: json
dataset_kwargs: {data_files: {test: $PWD/questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}]
END
cat >tasks/replies.yaml <<END
task: ours_replies
dataset_path: json
dataset_kwargs: {data_files: {test: $PWD/questions.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\n"], max_gen_toks: 20}
metric_list: [{metric: exact_match}]
END
export HF_DATASETS_OFFLINE=1 HF_HUB_OFFLINE=1 OPENAI_API_KEY=none
args="model=$ENGINE_MODEL,tokenizer_backend=remote,tokenized_requests=False,num_concurrent=2,max_retries=1"
lm_eval --model local-completions --include_path tasks --tasks ours_choices \
    --model_args "$args,base_url=$ENGINE_URL/v1/completions" >out 2>&1 || { tail -n 5 out >&2; exit 1; }
grep -q "ours_choices.*acc" out
args="model=$ENGINE_MODEL,tokenizer_backend=None,num_concurrent=2,max_retries=1"
lm_eval --model local-chat-completions --include_path tasks --tasks ours_replies --apply_chat_template \
    --model_args "$args,base_url=$ENGINE_URL/v1/chat/completions" >out 2>&1 || { tail -n 5 out >&2; exit 1; }
grep -q "ours_replies.*exact_match" out
