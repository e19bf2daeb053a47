#!/usr/bin/env bash
# Try a running server with real clients, each in an environment of its own: bench/clients.sh URL [NAME…]
#
#     engine serve &
#     bench/clients.sh http://127.0.0.1:8000                 # all of them, the lightest first
#     bench/clients.sh http://127.0.0.1:8000 openai codex    # these
#
# A line each: PASS name version what, or FAIL name version what: the error. The exit code is 1 if one failed.
# The programs are bench/clients/NAME.{py,mjs,sh}; their first line says what they try. CLIENTS_DIR keeps the environments
# (2 GB); without it they lie in a temporary folder, which is removed. Needs python3 (3.11 or newer), and node for three.
# torch is never installed. guidellm imports it all the same: it sees that of TORCH_PYTHON, a Python that has it (that
# of the engine, say), and without one it is skipped. docs/clients.md has the results.
set -uo pipefail

HERE=$(cd "$(dirname "$0")" && pwd)/clients
SECONDS_EACH=${SECONDS_EACH:-300}

# name, version, packages; kept in the order in which they are tried
CLIENTS="
openai           3.57.0   openai==3.57.0
anthropic        2.14.0   anthropic==2.14.0
llm              0.36     llm==0.36
instructor       1.17.0   instructor==1.17.0
pydantic-ai      2.68.0   pydantic-ai-slim[openai]==2.68.0
openai-agents    0.24.0   openai-agents==0.24.0
langchain        1.7.4    langchain-openai==1.7.4
litellm          1.110.2  litellm==1.110.2
haystack         3.4.1    haystack-ai==3.4.1
llama-index      0.8.1    llama-index-llms-openai-like==0.8.1
dspy             3.4.1    dspy==3.4.1
openai-node      7.59.0   npm:openai@7.59.0
vercel-ai        7.0.173  npm:ai@7.0.173 npm:@ai-sdk/openai-compatible@3.0.92 npm:zod@4.1.12
codex            0.171.0  npm:@openai/codex@0.171.0
lm-eval          0.4.13   lm-eval[api]==0.4.13
guidellm         0.8.1    guidellm==0.8.1
aider            0.86.2   aider-chat==0.86.2
"

main() {
    [ $# -ge 1 ] || { echo "usage: $0 URL [NAME…]; the names are" $(names) >&2; exit 2; }
    export ENGINE_URL=${1%/}
    shift
    for name in "$@"; do
        names | grep -qx -- "$name" || { echo "$0: there is no client $name; the names are" $(names) >&2; exit 2; }
    done
    ENGINE_MODEL=$(first_model 2>/dev/null) ||
        { echo "$0: no server answers at $ENGINE_URL/v1/models; start one with engine serve" >&2; exit 2; }
    export ENGINE_MODEL
    if [ -n "${CLIENTS_DIR:-}" ]; then
        mkdir -p "$CLIENTS_DIR"
        FOLDER=$(cd "$CLIENTS_DIR" && pwd)
    else
        FOLDER=$(mktemp -d)
        trap 'rm -rf "$FOLDER"' EXIT
    fi
    failed=0
    while read -r name version packages; do
        [ -n "$name" ] || continue
        [ $# -eq 0 ] || printf '%s\n' "$@" | grep -qx -- "$name" || continue
        try "$name" "$version" $packages || failed=1
    done <<<"$CLIENTS"
    exit $failed
}

first_model() {
    python3 -c 'import json, sys, urllib.request as u; print(json.load(u.urlopen(sys.argv[1]))["data"][0]["id"])' \
        "$ENGINE_URL/v1/models"
}

names() { awk 'NF { print $1 }' <<<"$CLIENTS"; }

try() { # NAME VERSION PACKAGE…
    local name=$1 version=$2 program what home=$FOLDER/$1 said
    shift 2
    program=$(echo "$HERE/$name".*)
    what=$(head -1 "$program" | tr -d '"#' | sed 's,^[/ ]*,,')
    if [ "$name" = guidellm ] && [ -z "${TORCH_PYTHON:-}" ]; then
        echo "SKIP $name $version $what: it imports torch; name a Python that has it in TORCH_PYTHON"
        return 0
    fi
    mkdir -p "$home/run"
    if ! said=$(install "$home" "$@" 2>&1); then
        echo "FAIL $name $version $what: not installed: $(last "$said")"
        return 1
    fi
    rm -rf "$home/run" && mkdir -p "$home/run"
    if said=$(cd "$home/run" && HOME=$home/run PATH=$home/venv/bin:$home/node_modules/.bin:$PATH \
        timeout "$SECONDS_EACH" $(runner "$program") 2>&1 </dev/null); then
        echo "PASS $name $version $what"
    else
        [ $? -ne 124 ] || said="nothing within $SECONDS_EACH s"
        echo "FAIL $name $version $what: $(last "$said")"
        return 1
    fi
}

runner() { # a client's program and what runs it; Python does not look beside it: openai.py must not be the package
    case $1 in
    *.py) echo "python -P $1" ;;
    *.mjs) cp "$1" . && echo "node $(basename "$1")" ;; # below its packages
    *.sh) echo "bash -eu $1" ;;
    esac
}

install() { # FOLDER PACKAGE…
    local home=$1
    shift
    [ "$(cat "$home/installed" 2>/dev/null)" != "$*" ] || return 0
    if [[ $1 == npm:* ]]; then
        (cd "$home" && echo '{"private": true}' >package.json && npm install --silent --no-audit --no-fund "${@#npm:}")
    else
        if [ ! -x "$FOLDER/uv/bin/uv" ]; then
            python3 -m venv "$FOLDER/uv" && "$FOLDER/uv/bin/pip" install --quiet uv
        fi
        echo "torch ; sys_platform == 'never'" >"$FOLDER/overrides.txt"
        python3 -m venv --clear --without-pip "$home/venv"
        "$FOLDER/uv/bin/uv" pip install --quiet --python "$home/venv/bin/python" --override "$FOLDER/overrides.txt" "$@" &&
            if [[ $home == */guidellm ]]; then # behind its own packages
                "$TORCH_PYTHON" -c 'import importlib.util, os; print(os.path.dirname(os.path.dirname(importlib.util.find_spec("torch").origin)))' \
                    >"$(echo "$home"/venv/lib/python*/site-packages)/torch_elsewhere.pth"
            fi
    fi && echo "$*" >"$home/installed"
}

last() { grep -v '^[[:space:]]*$' <<<"$1" | tail -1 | cut -c1-400; }

main "$@"
