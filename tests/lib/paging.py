"""Scripts that a browser runs in the page at /, and the audit of its accessibility."""

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest

from bench.lib.chromium import Tab, installed

AUDIT = """
const found = await axe.run(document, {resultTypes: ["violations"]});
return found.violations.map(each => `${each.id}: ${each.nodes.map(node => node.html.slice(0, 160)).join(" | ")}`);
"""
WAIT = "const until = async so => { while (!so()) await new Promise(done => setTimeout(done, 20)); };\n"
# Sends `text` as who presses Enter, and waits until the reply has ended.
SAY = """
const lengths = new Set(), plain = events;
let chunks = 0;
events = async function* (answer) { for await (const one of plain(answer)) { chunks++; yield one; } };
$("text").value = TEXT;
$("text").dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", bubbles: true, cancelable: true}));
while (stop) {
  lengths.add($("log").lastElementChild.textContent.length);
  await new Promise(done => setTimeout(done, 15));
}
events = plain;
return {lengths: lengths.size, chunks, node: chat.nodes[chat.leaf], shown: $("log").lastElementChild.innerText};
"""
# Drops or pastes a PNG, and waits until the page shows it or says why not.
GIVE = """
const bytes = Uint8Array.from(atob("DATA"), each => each.charCodeAt(0));
const held = new DataTransfer(), before = shown.length;
held.items.add(new File([bytes], "one.png", {type: "image/png"}));
note("");
document.body.dispatchEvent("EVENT" === "drop" ?
  new DragEvent("drop", {dataTransfer: held, bubbles: true, cancelable: true}) :
  new ClipboardEvent("paste", {clipboardData: held, bubbles: true, cancelable: true}));
await until(() => shown.length > before || $("note").textContent);
return [shown.length, $("note").textContent];
"""


def chromium() -> str:
    """The path of a Chromium; skips, or in CI fails, where there is none."""
    path = installed()
    if path is None:
        assert os.environ.get("CI", "") in ("", "false"), "no Chromium is installed, and CI is set"
        pytest.skip("no Chromium is installed: apt-get install chromium")
    return path


async def say(tab: Tab, text: str, **given: Any) -> dict[str, Any]:
    """Send `text` with these settings of the page; what came of it."""
    script = f"given = {json.dumps(given)};" + SAY.replace("TEXT", json.dumps(text))
    found: dict[str, Any] = await tab.run(WAIT + script)
    return found


def axe() -> str | None:
    """The script of axe-core from npm's cache; None where that has none (`npm cache add axe-core` gets it)."""
    if (npm := shutil.which("npm")) is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", "--offline", "--silent", "axe-core"]
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False, timeout=30)
        archives = [*Path(folder).glob("axe-core-*.tgz")]
        if done.returncode or not archives:
            return None
        with tarfile.open(archives[0]) as archive:
            file = archive.extractfile("package/axe.min.js")
            assert file is not None
            return file.read().decode()


async def violations(tab: Tab, script: str) -> list[str]:
    """What axe-core finds in the page as it is now."""
    if not await tab.run("return 'axe' in window;"):
        await tab.call("Runtime.evaluate", expression=script)
    found: list[str] = await tab.run(AUDIT)
    return found
