# codex exec: one question, answered
export CODEX_HOME=$HOME/codex OPENAI_API_KEY=none
mkdir -p "$CODEX_HOME"
# With all that it offers its prompt has 8,900 tokens, which is more than the default model takes: then without agents.
for agents in true false; do
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
[agents]
enabled = $agents
END
    if codex exec --skip-git-repo-check --sandbox read-only --json "Say hello." >out 2>err </dev/null; then
        grep -q '"type":"agent_message"' out || { tail -n 3 out >&2; exit 1; }
        exit 0
    fi
    grep -q "context" out || break
done
tail -qn 1 err out >&2
exit 1
