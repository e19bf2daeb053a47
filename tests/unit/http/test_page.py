"""The page at / in a real browser, over a real engine: what it shows, what it runs, and what it asks for.

With ENGINE_SCREENSHOTS it writes the pictures of docs/page.md.
"""

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import anyio
import pytest
from http_front import FakeFront, chunks, serving, text_of
from paging import GIVE, WAIT, axe, chromium, say, violations
from real_server import over_http
from routed import routing

from bench.lib.chromium import Tab, open_tab
from engine.config import resolve
from engine.http.page.files import read
from engine.messages.reply import Chunk
from engine.runtime.board import Counter
from engine.runtime.front import Front
from engine.runtime.launch import open_front

SECONDS = 200
MOST_BYTES = 60_000
PICTURES = os.environ.get("ENGINE_SCREENSHOTS")
HOSTILE = (
    "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'> [a](javascript:window.pwned=1) "
    "![b](https://elsewhere.example/b.png) [c](https://elsewhere.example/c)\n\n```html\n<iframe src=//x.example>\n```\n"
)
SHOWN = (
    "# Prefixes\n\nA **radix tree** keeps what prompts share, so `match` is one look-up a node:\n\n"
    "1. find the longest prefix\n2. lock it\n   - and all above\n3. compute the rest\n\n"
    "```python\nnode, pages = tree.match(key)\ntree.lock(node)\n```\n\n"
    "| | pages |\n|---|---|\n| cached | 12 |\n| own | 3 |\n"
)
SCHEMA = '{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": false}'
CALL = '<tool_call>\n{"name": "get_time", "arguments": {"zone": "UTC"}}\n</tool_call>'
THOUGHT = "<think>\nHm <b>.\n</think>\n\nIt is noon.\n"
TOOLS = '[{"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}]'
DOM = """
const reply = $("log").lastElementChild;
return {
  live: reply.querySelectorAll("script, img, iframe, [onerror]").length, pwned: "pwned" in window,
  links: [...reply.querySelectorAll("a")].map(each => each.href), text: reply.innerText,
};
"""
STOP = """
given = {numbers: {max_tokens: 3500, temperature: 0}, more: '{"ignore_eos": true}'};
$("text").value = "go";
submit();
await until(() => stop && chat.nodes[chat.leaf].text.length > 20);
const early = $("log").lastElementChild.textContent.length;
dispatchEvent(new KeyboardEvent("keydown", {key: "Escape"}));
await until(() => !stop);
const {finish, text} = chat.nodes[chat.leaf];
return {finish, length: text.length, early, note: $("note").textContent};
"""
BRANCH = """
given = {numbers: {max_tokens: 4, temperature: 0}, more: ''};
edit(0);
const field = $("m0").querySelector("textarea");
field.value = "another";
field.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", ctrlKey: true}));
await until(() => stop);
await until(() => !stop);
const places = [$("log").firstElementChild.innerText];
$("log").querySelector("[aria-label='Branch before']").click();
places.push($("log").firstElementChild.innerText, path().length);
return places;
"""
SETTINGS = """
given = {};
drawSettings();
const field = $("p-temperature"), results = [field.min, field.max];
for (const value of ["3", "0.5"]) {
  field.value = value;
  field.dispatchEvent(new Event("input"));
  results.push(given.numbers.temperature ?? null);
}
return [...results, $("set").querySelectorAll("input, textarea, select").length];
"""
EXPORT = """
given = {numbers: {max_tokens: 3}};
exported();
const texts = [];
for (const each of $("box").querySelectorAll("p button")) {
  each.click();
  texts.push($("out").querySelector("code").textContent);
}
$("box").close();
return texts;
"""
PIXEL = (  # a PNG of one
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
KEYS = """
const press = (key, target = document.body, more = {}) => {
  target.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true, ...more}));
};
const text = $("text"), found = [];
text.blur();
press("/");
found.push(document.activeElement.id);
text.value = "a line";
press("Enter", text, {shiftKey: true});
found.push(text.value, chat.nodes.length);
text.value = "";
press("ArrowUp", text);
found.push(document.activeElement.ariaLabel);
press("Escape", document.activeElement);
document.activeElement.blur();
press("s");
found.push($("set").hidden);
document.activeElement.blur();
press("s");
found.push($("set").hidden);
press("e");
found.push($("title").textContent);
$("box").close();
press("?");
found.push($("title").textContent);
$("box").close();
const before = chat;
press("n");
found.push(chat !== before && chat.nodes.length);
open(before);
return found;
"""
THEME = """
const shown = () => [$("theme").ariaLabel, getComputedStyle(document.body).backgroundColor];
const found = [shown()];
for (let times = 0; times < 2; times++) { $("theme").click(); found.push(shown()); }
$("theme").click();
return found;
"""
LIVE = """
location.hash = "#live";
await until(() => told && told.counts.running > 3 && told.steps.seconds.length > 20 && told.tree.pages.length > 3);
const sum = column => column.reduce((a, b) => a + b, 0);
const first = {nodes: told.tree.pages.length, pages: sum(told.tree.pages), rows: told.rows.slots.length,
               running: told.counts.running, computed: sum(told.rows.computed)};
const find = () => [...$("icicle").children].find(each => each.textContent.startsWith("You are"));
await until(find);
const one = find();
one.focus();
await until(() => $("prefix").textContent.includes("You are"));
first.prefix = $("prefix").textContent;
await until(() => sum(told.tree.pages) > first.pages + 30);
first.later = sum(told.tree.pages);
one.click();
first.zoomed = [zoom !== "", $("crumbs").textContent];
$("crumbs").querySelector("button").click();
await until(() => told.tiers[1].used > 0);
first.tiers = told.tiers.map(each => [each.tier, each.pages, each.used]);
const corner = id => [...$(id).getContext("2d").getImageData(2, 2, 1, 1).data].slice(0, 3).join(", ");
first.corners = [["map", told.pages], ...told.tiers.map(each => [each.tier, each.map])].map(([id, map]) =>
  [paint(OWNERS[map.owners[0]]), `rgb(${corner(id)})`]);
first.ceiling = told.ceiling;
first.named = info.internal_states[0].tiers.host_pages;
first.texts = Object.fromEntries(["figures", "actors", "assets", "ranks"].map(id => [id, $(id).innerText]));
first.labels = [...document.querySelectorAll("canvas")].map(each => [each.id, each.ariaLabel]);
return first;
"""
EXPERTS = """
info.device.mixture = true;
layout();
drawLive(told);
mixture = {layers: [1, 3], ranks: 2, counts: [[40, 10, 10], [0, 0, 0]], loads: [[30, 10], [0, 0]], balance: [1.5, 1]};
drawExperts();
const pen = $("experts").getContext("2d"), shade = x => pen.getImageData(x, 2, 1, 1).data[3];
const found = [$("experts").ariaLabel, shade(5) > shade($("experts").width - 5)];
info.device.mixture = false;
layout();
drawLive(told);
return found;
"""
WORKERS = """
location.hash = "#live";
await until(() => $("workers")?.querySelector("a"));
return [$("workers-said").textContent, $("workers").querySelector("a").href, $("workers").innerText];
"""
ACTS = """
const named = () => [...$("acts").querySelectorAll("button")].map(each => each.textContent), found = [named()];
info.options.server.profile_dir = "/traces";
layout();
found.push(named());
info.options.server.profile_dir = null;
layout();
drawLive({...told, copies: [{pages: 9, pages_free: 2, pages_cached: 3, running: 5}, {...told.counts, running: 7}]});
found.push($("ranks").innerText);
drawLive(told);
[...$("acts").querySelectorAll("button")].at(-1).click();
await until(() => $("box").open);
found.push($("box").innerText);
[...$("box").querySelectorAll("button")].at(-1).click();
await until(() => $("acted").textContent);
return [...found, $("acted").textContent];
"""
PAUSE = """
const press = async name => {
  $("pause").click();
  await until(() => $("box").open);
  const question = $("box").textContent;
  [...$("box").querySelectorAll("button")].find(each => each.textContent === name).click();
  return question;
};
const asked = await press("Pause");
await until(() => told.status === "paused");
await press("Continue");
await until(() => told.status === "ready");
$("pause").click();
$("box").querySelector("button").click();
return asked;
"""
KEYED = """
await until(() => $("box").open);
const asked = $("box").innerText;
$("key").value = "guess";
$("box").querySelector("form").requestSubmit();
await until(() => $("box").open && $("box").innerText.includes("wrong"));
$("key").value = "sesame";
$("box").querySelector("form").requestSubmit();
await until(() => $("name").textContent === "fake");
return {asked, tab: sessionStorage.getItem("engine.key"), stored: JSON.stringify(localStorage).includes("sesame")};
"""
ANSWER = """
const form = $("log").querySelector("form");
form.querySelector("textarea").value = "12:00";
form.requestSubmit();
await until(() => stop);
await until(() => !stop);
const reply = $("log").lastElementChild, fold = reply.querySelector("details");
return {folded: !fold.open, thought: fold.textContent, said: reply.querySelector(".text").innerText};
"""


@asynccontextmanager
async def engine(disk: Path) -> AsyncIterator[tuple[Front, str]]:
    """A real engine of the echo model, whose pages are of 64 bytes, with tiers below the device; and its URL."""
    config = resolve({"model": "echo", "kv_tokens": 131072, "kv_host": "64KiB", "kv_disk": f"{disk}:4MiB", "port": 0})
    async with open_front(config) as front:
        await front.ready()
        async with over_http(front, config.server) as url:
            yield front, url


async def traffic(url: str, count: int) -> None:
    """Requests that share the beginnings of their prompts."""

    async def one(session: aiohttp.ClientSession, number: int) -> None:
        kinds = ("Translate: ", "Summarise: ", "Answer in one sentence: ")
        text = "You are a careful assistant. " * 4 + kinds[number % 3] * 6 + f"number {number}. " + "word " * number
        body = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 600 + 97 * (number * 7 % 30),
            "temperature": 0,
            "ignore_eos": True,
        }
        await asyncio.sleep(0.05 * number)
        async with session.post("/v1/chat/completions", json=body) as answer:
            await answer.read()

    async with aiohttp.ClientSession(url) as session, anyio.create_task_group() as group:
        for number in range(count):
            group.start_soon(one, session, number)


async def picture(tab: Tab, name: str, width: int, height: int, *, dark: bool = False) -> None:
    if PICTURES:
        await tab.picture(Path(PICTURES) / f"{name}.png", width, height, dark=dark)


async def chat(tab: Tab, front: Front, url: str, seen: dict[str, Any], audit: str | None) -> None:
    await tab.call("Emulation.setFocusEmulationEnabled", enabled=True)
    await tab.open(f"{url}/")
    await tab.run(WAIT + "await until(() => $('name').textContent === 'echo' && $('set').children.length > 5);")
    plain = {"more": '{"ignore_eos": true}'}
    seen["streamed"] = await say(tab, "hello", numbers={"max_tokens": 400, "temperature": 0}, **plain)
    seen["branches"] = await tab.run(WAIT + BRANCH)
    await tab.run("open();")
    seen["stopped"] = await tab.run(WAIT + STOP)
    with anyio.fail_after(60):
        while front.open:  # the engine ends it, too
            await anyio.sleep(0.02)
    await tab.run("open();")
    seen["settings"] = await tab.run(SETTINGS)
    seen["schema"] = await say(tab, "by schema", schema=SCHEMA)
    seen["pair"] = await tab.run("return [...document.querySelectorAll('.pair code')].map(each => each.textContent);")
    seen["sure"] = await say(tab, "how sure", heat=True, numbers={"max_tokens": 6, "temperature": 0})
    seen["spans"] = await tab.run("return [...document.querySelectorAll('.heat span')].map(each => each.title);")
    await tab.run("open();")
    await say(tab, "What does the cache keep?", more=choice(SHOWN))
    seen["markdown"] = await tab.run("return $('log').lastElementChild.querySelector('.text').innerHTML;")
    await tab.run("given = {}; drawSettings(); settings();")
    await picture(tab, "chat", 1200, 760)
    if audit:
        seen["audit chat"] = await in_both_schemes(tab, audit)
    await tab.run("settings();")
    await picture(tab, "phone", 390, 700, dark=True)
    await say(tab, "be hostile", more=choice(HOSTILE))
    seen["hostile"] = await tab.run(DOM)
    seen["pictures"] = [await tab.run(WAIT + give(event)) for event in ("drop", "paste")]
    seen["export"] = await tab.run(EXPORT)
    seen["curl"] = await anyio.run_process(["sh", "-c", seen["export"][1]])
    seen["keys"] = await tab.run(WAIT + KEYS)
    seen["themes"] = await tab.run(THEME)
    await tab.open(f"{url}/")
    seen["kept"] = await tab.run("return [chats.length, $('chats').innerText, $('log').innerText];")
    seen["width"] = await narrow(tab)


def choice(text: str) -> str:
    """Fields that let the model say `text` alone."""
    return json.dumps({"choice": [text]})


def give(event: str) -> str:
    return GIVE.replace("EVENT", event).replace("DATA", PIXEL)


async def narrow(tab: Tab) -> int:
    """By how much the page is wider than a phone."""
    await tab.resize(390, 760)
    wider: int = await tab.run("return document.documentElement.scrollWidth - innerWidth;")
    await tab.resize(1200, 900)
    return wider


async def in_both_schemes(tab: Tab, audit: str) -> list[str]:
    """What axe-core finds in the page in dark and in light."""
    found = []
    for scheme in ("dark", "light"):
        await tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        found += await violations(tab, audit)
    return found


async def live(tab: Tab, front: Front, url: str, seen: dict[str, Any], audit: str | None) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(traffic, url, 48)
        seen["live"] = await tab.run(WAIT + LIVE)
        await picture(tab, "live", 1200, 1160)
        seen["experts"] = await tab.run(EXPERTS)
        seen["acts"] = await tab.run(WAIT + ACTS)
        seen["asked to pause"] = await tab.run(WAIT + PAUSE)
        seen["live width"] = await narrow(tab)
        if audit:
            seen["audit live"] = await in_both_schemes(tab, audit)
        front.abort(None)
    await tab.run("location.hash = '#chat';")
    with anyio.fail_after(60):
        while front.board.total(Counter.VIEWERS) or front.open:
            await anyio.sleep(0.02)


async def keyed(tab: Tab, seen: dict[str, Any], audit: str | None) -> None:
    front = FakeFront(chunks(*[CALL[at : at + 9] for at in range(0, len(CALL), 9)]))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    front.text = text_of(template + "{% if add_generation_prompt %}{% endif %}", "hermes", "qwen3")
    async with serving(front, api_key=("sesame",)) as url:
        await tab.open(f"{url}/")
        seen["key"] = await tab.run(WAIT + KEYED)
        await tab.run(WAIT + "location.hash = '#live'; await until(() => told && !$('live').hidden);")
        seen["keyed view"] = await tab.run("location.hash = '#chat'; return $('figures').innerText;")
        seen["called"] = await say(tab, "what time is it?", tools=TOOLS)
        pieces = [THOUGHT[at : at + 9] for at in range(0, len(THOUGHT), 9)]
        front.script = [
            Chunk("r", text, [number], "stop" if number == len(pieces) else None, None, 7, 0, number)
            for number, text in enumerate(pieces, start=1)
        ]
        seen["answered"] = await tab.run(WAIT + ANSWER)
        seen["result"] = [message.role for message in front.asked[-1].messages or ()]
        if audit:
            seen["audit call"] = await violations(tab, audit)


async def routed(tab: Tab, seen: dict[str, Any]) -> None:
    async with serving(FakeFront()) as worker, routing(worker) as (url, _):
        await tab.open(f"{url}/")
        seen["worker"] = worker
        seen["workers"] = await tab.run(WAIT + WORKERS)
        await tab.run("location.hash = '#chat';")
        seen["through a router"] = await say(tab, "hello")


async def visit(path: str, disk: Path) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    finding = asyncio.get_running_loop().run_in_executor(None, axe)
    with anyio.fail_after(SECONDS):
        async with open_tab(path) as tab, engine(disk) as (front, url):
            audit = await finding
            await chat(tab, front, url, seen, audit)
            await live(tab, front, url, seen, audit)
            seen["errors"], seen["origins"] = [*tab.errors], {urlsplit(each).netloc for each in tab.asked}
            seen["own"] = urlsplit(url).netloc
            await keyed(tab, seen, audit)
            await routed(tab, seen)
            seen["keyed errors"] = [each for each in tab.errors[len(seen["errors"]) :] if "401" not in each]
    return seen


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return anyio.run(visit, chromium(), tmp_path_factory.mktemp("disk"))


def test_the_page_is_small_and_names_nobody_else() -> None:
    text, policy = read("home.html")
    assert len(text) < MOST_BYTES
    assert b"innerHTML" not in text and b"eval(" not in text and b"src=" not in text
    assert policy.count("'sha256-") == 2 and "unsafe" not in policy and "default-src 'none'" in policy


def test_a_reply_streams_and_is_counted(seen: dict[str, Any]) -> None:
    streamed = seen["streamed"]
    assert streamed["lengths"] > 2 and streamed["node"]["usage"]["completion_tokens"] == 400
    assert "400 tokens · " in streamed["shown"] and " tokens/s · prompt 6 · first after " in streamed["shown"]


def test_stop_stops(seen: dict[str, Any]) -> None:
    stopped = seen["stopped"]
    assert stopped["finish"] == "stopped" and 20 < stopped["length"] < 3500
    assert stopped["note"].startswith("Reply stopped.")


def test_an_edit_is_a_branch(seen: dict[str, Any]) -> None:
    first, second, length = seen["branches"]
    assert "2/2" in first and "another" in first and "1/2" in second and "hello" in second and length == 2


def test_a_hostile_reply_stays_text(seen: dict[str, Any]) -> None:
    hostile = seen["hostile"]
    assert (hostile["live"], hostile["pwned"]) == (0, False)
    for part in (
        "<script>window.pwned = 1</script>",
        "<img src=x",
        "[a](javascript:",
        "![b](",
        "<iframe src=//x.example>",
    ):
        assert part in hostile["text"]
    assert hostile["links"] == ["https://elsewhere.example/b.png", "https://elsewhere.example/c"]


def test_markdown(seen: dict[str, Any]) -> None:
    for part in (
        "<strong>radix tree</strong>",
        "<code>match</code>",
        '<ol start="1"><li>find',
        "<ul><li>and all above</li></ul>",
        "<td>cached</td><td>12</td>",
        ">Prefixes</p>",
        "<code>node, pages = tree.match(key)\ntree.lock(node)</code>",
    ):
        assert part in seen["markdown"]


def test_settings_have_the_bounds_of_the_server(seen: dict[str, Any]) -> None:
    assert seen["settings"][:4] == ["0", "2", None, 0.5] and seen["settings"][4] >= 15


def test_a_schema_stands_beside_its_reply_and_tokens_tell_how_sure_they_are(seen: dict[str, Any]) -> None:
    reply, schema = seen["pair"]
    assert reply in ('{\n  "a": 1\n}', '{\n  "a": 2\n}') and schema == SCHEMA
    assert len(seen["spans"]) == 6 and all("%" in title for title in seen["spans"])


def test_conversations_stay_and_are_exported(seen: dict[str, Any]) -> None:
    count, names, log = seen["kept"]
    assert count == 4 and "What does the cache keep?" in names and "be hostile" in log
    saved, curl, python = seen["export"]
    assert (
        json.loads(saved)["nodes"][0]["parent"] == -1
        and curl.startswith("curl http://127.0.0.1:")
        and "from openai import OpenAI" in python
    )
    compile(python, "conversation.py", "exec")
    answered = json.loads(seen["curl"].stdout)  # the call that is exported is one that works
    assert answered["usage"]["completion_tokens"] == 3 and answered["model"] == "echo"


def test_a_model_that_reads_text_alone_is_shown_no_pictures(seen: dict[str, Any]) -> None:
    assert seen["pictures"] == 2 * [[0, "echo reads text alone: it takes no pictures."]]


def test_the_keyboard_is_enough(seen: dict[str, Any]) -> None:
    write, line, count, edited, opened, closed, export, help, new = seen["keys"]
    assert (write, line, edited) == ("text", "a line", "Edited message") and count > 1  # Shift Enter sends nothing
    assert (opened, closed, export, help, new) == (False, True, "Export", "Keys", 0)


def test_a_theme_is_chosen(seen: dict[str, Any]) -> None:
    assert [name for name, _ in seen["themes"]] == ["Theme: auto", "Theme: light", "Theme: dark"]
    assert [colour for _, colour in seen["themes"][1:]] == ["rgb(252, 252, 250)", "rgb(19, 20, 22)"]


def test_the_live_view_shows_a_batch_and_a_tree_that_grows(seen: dict[str, Any]) -> None:
    live = seen["live"]
    assert live["rows"] == live["running"] > 3 and live["computed"] > 0 and live["later"] > live["pages"] + 30
    assert "used by" in live["prefix"] and "You are" in live["prefix"]
    assert live["zoomed"] == [True, "↑ the whole tree"]
    labels = dict(live["labels"])
    assert (
        labels.keys() == {"strip", "rows", "map", "queue", "host", "store"}
        and "decode" in labels["rows"]
        and "in use of" in labels["map"]
        and " ms, " in labels["strip"]
        and "in the queue" in labels["queue"]
    )


def test_figures_actors_needs_and_devices_are_told_in_words(seen: dict[str, Any]) -> None:
    texts = seen["live"]["texts"]
    assert re.search(r"cache hits\s+[\d.]+%\s+(now \d+%, )?ceiling [\d.]+%", texts["figures"]), texts["figures"]
    for actor in ("scheduler", "executor", "maker of grammar", "tokenizer", "detokenizer", "front"):
        assert re.search(rf"^{actor}\s+\d+ (of \d+|wait)", texts["actors"], re.MULTILINE), texts["actors"]
    assert "grammar, ready" in texts["assets"] and "one device" in texts["ranks"]


def test_tiers_are_maps_of_their_own(seen: dict[str, Any]) -> None:
    live = seen["live"]
    (host, room, used), (store, also, kept) = live["tiers"]
    assert (host, room, live["named"], store) == ("host", 1024, 1024, "store")
    assert 0 < kept <= used <= room and kept < also == (4 << 20) // 64
    labels = dict(live["labels"])
    assert labels["host"] == f"host memory: {used} of 1024 pages" and labels["store"].startswith(f"disk: {kept} of ")
    assert all(wanted == drawn for wanted, drawn in live["corners"])
    assert 0.3 < live["ceiling"] < 1  # most of these prompts begin alike


def test_experts_are_a_heat_map(seen: dict[str, Any]) -> None:
    label, hotter = seen["experts"]
    assert "2 layers of 3 experts on 2 ranks; largest load of a rank over the mean 1.25" in label and hotter


def test_a_router_shows_its_workers_and_passes_the_chat_on(seen: dict[str, Any]) -> None:
    count, link, line = seen["workers"]
    assert (count, link) == ("1 worker", f"{seen['worker']}/#live") and " of 1024 running" in line
    assert "Hello, world" in seen["through a router"]["shown"]


def test_what_acts_asks_first(seen: dict[str, Any]) -> None:
    plain, profiled, copies, asked, flushed = seen["acts"]
    assert (plain, profiled) == (["Pause", "Flush cache"], ["Pause", "Flush cache", "Profile 20 steps"])
    assert re.search(r"copy 0\s+5 running\s+copy 1\s+7 running", copies)
    assert "computed anew" in asked and re.fullmatch(r"freed \d+, in_use \d+", flushed)
    assert "No step is planned until it is continued" in seen["asked to pause"]


def test_a_key_is_asked_for_and_kept_for_the_tab(seen: dict[str, Any]) -> None:
    assert "asks for a key" in seen["key"]["asked"]
    assert (seen["key"]["tab"], seen["key"]["stored"]) == ("sesame", False)
    assert "viewers\n1" in seen["keyed view"]  # the live view streams with it


def test_calls_are_shown_and_answered_and_reasoning_is_folded(seen: dict[str, Any]) -> None:
    (call,) = seen["called"]["node"]["calls"]
    assert (call["name"], call["text"]) == ("get_time", '{"zone": "UTC"}') and "call of get_time" in seen["called"][
        "shown"
    ]
    assert seen["result"] == ["user", "assistant", "tool"]
    assert (
        seen["answered"]["folded"]
        and "Hm <b>." in seen["answered"]["thought"]
        and seen["answered"]["said"] == "It is noon."
    )


def test_the_page_fits_a_phone(seen: dict[str, Any]) -> None:
    assert (seen["width"], seen["live width"]) == (0, 0)


def test_the_console_is_empty_and_nobody_else_is_asked(seen: dict[str, Any]) -> None:
    assert (seen["errors"], seen["keyed errors"]) == ([], [])
    assert seen["origins"] - {""} == {seen["own"]}


@pytest.mark.parametrize("place", ["chat", "live", "call"])
def test_axe_finds_nothing(seen: dict[str, Any], place: str) -> None:
    if f"audit {place}" not in seen:
        pytest.skip("npm's cache has no axe-core: npm cache add axe-core")
    assert seen[f"audit {place}"] == []
