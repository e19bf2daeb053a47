# a concurrent load of four prompts from a file, with its report
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
for prompt in "Say hello." "Name a colour." "Count to three." "What is 2 + 2?"; do
    echo "{\"prompt\": \"$prompt\"}"
done >prompts.jsonl
guidellm run --backend "kind=openai_http,target=$ENGINE_URL,max_tokens=20" --profile kind=concurrent,streams=2 \
    --constraint kind=max_requests,count=4 --data kind=json_file,path=prompts.jsonl --output kind=json \
    --disable-console >out 2>&1 || { tail -n 5 out >&2; exit 1; }
python - benchmarks.json <<'END'
import json, sys
(run,) = json.load(open(sys.argv[1]))["benchmarks"]
totals = run["metrics"]["request_totals"]
assert totals["successful"] == 4 and not totals["errored"], totals
END
