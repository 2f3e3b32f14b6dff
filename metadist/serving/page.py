"""The page on which a person tries a run: name classes, drop a few pictures into each, drop one to ask about."""

from __future__ import annotations

import json
from html import escape

from metadist.serving.requests import Reader

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
  :root { color-scheme: light dark; --line: #9aa3b255; --on: #2f6fde; }
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 0 auto; padding: 1rem; }
  fieldset, .drop { border: 1px solid var(--line); border-radius: .5rem; margin: 0 0 .8rem; padding: .7rem; }
  .drop { border-style: dashed; min-height: 3.2rem; }
  .drop.over { border-color: var(--on); }
  .drop img { height: 3rem; margin: .15rem; image-rendering: pixelated; vertical-align: middle; }
  input, textarea, button { font: inherit; max-width: 100%; box-sizing: border-box; }
  fieldset { min-width: 0; }
  input[type=text], input[type=password], textarea { width: 100%; box-sizing: border-box; padding: .3rem .5rem; }
  button { padding: .4rem .9rem; cursor: pointer; }
  .bar { display: grid; grid-template-columns: 8rem 1fr 4rem; gap: .5rem; align-items: center; }
  .bar span:first-child { overflow-wrap: anywhere; }
  .bar i { display: block; height: .8rem; background: var(--on); border-radius: .2rem; }
  #said { min-height: 1.5rem; }
</style>
<h1>@TITLE@</h1>
<p>Name two classes or more, and give a few @THINGS@ of each. Then ask about another.</p>
<p id="bearing" hidden><label>Token <input type="password" id="token" autocomplete="off"></label></p>
<div id="classes"></div>
<p><button id="more">Another class</button> <button id="learn">Learn these</button></p>
<p id="said" role="status"></p>
<fieldset id="asking" hidden>
  <legend>What is this?</legend>
  <div id="query"></div>
  <p><button id="ask">Ask</button></p>
  <div id="answer"></div>
</fieldset>
<script>
"use strict";
const about = @ABOUT@;
const $ = (id) => document.getElementById(id);
let adapter = null;
$("bearing").hidden = !about.token;

function say(text) { $("said").textContent = text; }

function read(file) {
  return new Promise((done, fail) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => fail(reader.error);
    reader.readAsDataURL(file);
  });
}

// A place for examples: pictures are dropped or chosen, texts are lines.
function place(into, many) {
  const held = [];
  if (about.field === "text") {
    const area = document.createElement("textarea");
    area.rows = many ? 3 : 1;
    area.placeholder = many ? "one text in each line" : "a text";
    into.append(area);
    return () => area.value.split("\\n").map((t) => t.trim()).filter(Boolean);
  }
  const box = document.createElement("div"), input = document.createElement("input");
  box.className = "drop";
  input.type = "file"; input.accept = "image/*"; input.multiple = many;
  async function take(files) {
    if (!many) { held.length = 0; box.querySelectorAll("img").forEach((i) => i.remove()); }
    for (const file of files) {
      const data = await read(file), shown = document.createElement("img");
      shown.src = data; shown.alt = file.name; box.append(shown); held.push(data);
    }
  }
  input.onchange = () => take([...input.files]);
  box.ondragover = (e) => { e.preventDefault(); box.classList.add("over"); };
  box.ondragleave = () => box.classList.remove("over");
  box.ondrop = (e) => { e.preventDefault(); box.classList.remove("over"); take([...e.dataTransfer.files]); };
  box.append(input); into.append(box);
  return () => held;
}

const classes = [];
function another() {
  const set = document.createElement("fieldset"), name = document.createElement("input");
  name.type = "text"; name.placeholder = "name of the class"; name.setAttribute("aria-label", "name of the class");
  set.append(name); $("classes").append(set);
  classes.push({ name, examples: place(set, true) });
}
another(); another();
const query = place($("query"), !about.alone);
$("more").onclick = another;

async function send(method, path, body) {
  const headers = { "Content-Type": "application/json" };
  if (about.token) headers.Authorization = "Bearer " + $("token").value;
  const reply = await fetch(path, { method, headers, body: JSON.stringify(body) });
  const told = await reply.json().catch(() => ({}));
  if (!reply.ok) throw new Error(told.error || "the server answers with " + reply.status);
  return told;
}

$("learn").onclick = async () => {
  const support = classes.flatMap((c) => c.examples().map((e) => ({ class: c.name.value.trim(), [about.field]: e })));
  say("learning ...");
  try {
    const told = await send("POST", "adapters", { support });
    adapter = told.adapter;
    $("asking").hidden = false; $("answer").textContent = "";
    say("learned " + Object.entries(told.classes).map(([n, k]) => n + " (" + k + ")").join(", "));
  } catch (e) { say(e.message); }
};

$("ask").onclick = async () => {
  try {
    const asked = query().map((e) => ({ [about.field]: e }));
    const told = await send("POST", "adapters/" + adapter + "/predict", { query: asked });
    $("answer").replaceChildren(...told.predictions.flatMap((p) => bars(p.probabilities)));
    say("");
  } catch (e) { say(e.message); }
};

function bars(probabilities) {
  return Object.entries(probabilities).sort((a, b) => b[1] - a[1]).map(([name, p]) => {
    const row = document.createElement("div"), bar = document.createElement("i");
    row.className = "bar"; bar.style.width = 100 * p + "%";
    const cells = [name, bar, (100 * p).toFixed(1) + " %"].map((c) => {
      const cell = document.createElement("span"); cell.append(c); return cell;
    });
    row.append(...cells);
    return row;
  });
}
</script>
</html>
"""


def page(reader: Reader, title: str, token: bool, alone: bool = False) -> str:
    """The page of a run.

    Args:
        reader: what examples are.
        title: the run's name.
        token: whether requests must bear one.
        alone: whether one example is asked about at a time.
    """
    about = json.dumps({"field": reader.field, "token": token, "alone": alone}).replace("<", "\\u003c")
    things = "pictures" if reader.field == "picture" else "texts"
    return _PAGE.replace("@TITLE@", escape(title)).replace("@THINGS@", things).replace("@ABOUT@", about)
