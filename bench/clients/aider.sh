# one message about a file, streamed and not
git init --quiet project
cd project
echo 'print("hello")' >hello.py
for stream in --stream --no-stream; do
    OPENAI_API_BASE=$ENGINE_URL/v1 OPENAI_API_KEY=none aider --model "openai/$ENGINE_MODEL" $stream --yes-always \
        --no-git --no-check-update --no-show-model-warnings --no-analytics --map-tokens 0 --no-detect-urls \
        --edit-format ask --message "What does hello.py print?" hello.py >out 2>&1 </dev/null
    grep -q "Tokens:.*received" out || { tail -n 5 out >&2; exit 1; }
done
