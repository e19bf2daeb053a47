# codex exec: one question, answered
export CODEX_HOME=$HOME/codex OPENAI_API_KEY=none
mkdir -p "$CODEX_HOME"
for features in "" "multi_agent = false"; do # with all features its prompt is of 8,900 tokens: more than the default model takes
    cat >"$CODEX_HOME/config.toml" <<END
model = "$ENGINE_MODEL"
model_provider = "ours"
[model_providers.ours]
name = "ours"
base_url = "$ENGINE_URL/v1"
wire_api = "responses"
env_key = "OPENAI_API_KEY"
request_max_retries = 0
stream_max_retries = 0
[features]
$features
END
    if codex exec --skip-git-repo-check --sandbox read-only --json "Say hello." >out 2>err </dev/null; then
        grep -q '"type":"agent_message"' out || { tail -n 3 out >&2; exit 1; }
        exit 0
    fi
    grep -q "context" out || break
done
tail -qn 1 err out >&2
exit 1
