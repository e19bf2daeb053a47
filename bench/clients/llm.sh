# a prompt, streamed and not, a schema
export LLM_USER_PATH=$HOME/llm
mkdir -p "$LLM_USER_PATH"
cat >"$LLM_USER_PATH/extra-openai-models.yaml" <<END
- model_id: ours
  model_name: $ENGINE_MODEL
  api_base: $ENGINE_URL/v1
  supports_schema: true
  supports_tools: true
END
llm -m ours -o max_tokens 20 --key none "Say hello." | grep -q .
llm -m ours -o max_tokens 20 --key none --no-stream "Say hello." | grep -q .
llm -m ours -o max_tokens 60 --key none --schema "name, age int" "Ann is 30 years old." | python -m json.tool >/dev/null
