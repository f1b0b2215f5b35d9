// The page: conversation, settings, status. Everything that comes from outside is set as text, never as markup.

import { SETTINGS, request, send } from "/chat.js";
import { duration, figure, start } from "/plots.js";

const STORE = "quantlab.settings";
const $ = (id) => document.getElementById(id);
const turns = []; // {role, text}
let card = { id: "", chat_template: true };
let going = null; // the AbortController of the answer under way

// --- settings ---

const fields = new Map(SETTINGS.map((setting) => [setting.name, field(setting)]));

function field(setting) {
  const made = document.createElement(setting.kind === "lines" ? "textarea" : setting.kind === "choice" ? "select" : "input");
  made.id = `set-${setting.name}`;
  const label = Object.assign(document.createElement("label"), { htmlFor: made.id, textContent: setting.label });
  const box = document.createElement("div");
  if (setting.kind === "number") Object.assign(made, { type: "number", min: setting.min, max: setting.max, step: setting.step });
  if (setting.kind === "check") Object.assign(made, { type: "checkbox" });
  if (setting.kind === "lines") made.rows = 2;
  for (const [value, name] of Object.entries(setting.choices ?? {})) made.append(new Option(name, value));
  if (setting.kind === "lines") box.classList.add("wide");
  if (setting.kind === "check") box.classList.add("wide", "check");
  box.append(...(setting.kind === "check" ? [made, label] : [label, made]));
  if (setting.hint) box.append(Object.assign(document.createElement("small"), { textContent: setting.hint }));
  $("settings").append(box);
  return made;
}

function settings() {
  const read = (setting, input) =>
    setting.kind === "check" ? input.checked : setting.kind === "number" && input.value !== "" ? Number(input.value) : input.value;
  return Object.fromEntries(SETTINGS.map((setting) => [setting.name, read(setting, fields.get(setting.name))]));
}

function restore() {
  let kept = {};
  try {
    kept = JSON.parse(localStorage.getItem(STORE)) ?? {};
  } catch {
    // No storage, or another's data in it: the defaults do.
  }
  for (const setting of SETTINGS) {
    const [input, value] = [fields.get(setting.name), kept[setting.name] ?? setting.value];
    if (setting.kind === "check") input.checked = value === true;
    else input.value = value;
    if (setting.kind === "choice" && !(input.value in setting.choices)) input.value = setting.value;
  }
}

function changed() {
  const chosen = settings();
  try {
    localStorage.setItem(STORE, JSON.stringify(chosen));
  } catch {
    // A browser that keeps nothing still works.
  }
  fields.get("schema").parentElement.hidden = chosen.format !== "json_schema";
  fields.get("system").parentElement.hidden = chosen.mode !== "chat";
  $("text-label").textContent = chosen.mode === "chat" ? "Message" : "Text";
  $("text").placeholder = chosen.mode === "chat" ? "Ask something" : "Begin a text; the model goes on";
  $("turns").dataset.empty = chosen.mode === "chat" ? "Nothing said yet." : "Begin a text and the model goes on with it.";
  curl();
}

// --- conversation ---

function show(role) {
  const [item, text, figures] = ["li", "div", "div"].map((tag) => document.createElement(tag));
  item.className = role;
  text.className = "text";
  figures.className = "figures";
  item.append(text, figures);
  $("turns").append(item);
  return { item, text, figures };
}

/** Carries out a change of the turns; who reads at their end stays at their end. */
function keepingPlace(change) {
  const list = $("turns");
  const following = list.scrollHeight - list.scrollTop - list.clientHeight < 60;
  change();
  if (following) list.scrollTop = list.scrollHeight;
}

function append(view, piece) {
  if (piece.sure < 3) {
    const part = Object.assign(document.createElement("span"), { textContent: piece.text, title: piece.tip });
    part.className = `sure${piece.sure}`;
    view.text.append(part);
  } else {
    view.text.append(piece.text);
  }
}

async function answer() {
  const view = show("assistant");
  $("turns").scrollTop = $("turns").scrollHeight;
  view.item.classList.add("going");
  const [began, turn] = [performance.now(), { role: "assistant", text: "" }];
  let first = null;
  going = new AbortController();
  busy(true);
  try {
    const asked = request(card.id, settings(), turns);
    const end = await send(asked, going.signal, (piece) => {
      first ??= performance.now();
      turn.text += piece.text;
      keepingPlace(() => append(view, piece));
    });
    keepingPlace(() => (view.figures.textContent = told(end, began, first)));
  } catch (error) {
    const stopped = error.name === "AbortError";
    view.figures.textContent = stopped ? "stopped" : error.message;
    view.item.classList.toggle("failed", !stopped);
  }
  turns.push(turn);
  view.item.classList.remove("going");
  going = null;
  busy(false);
}

function told({ finish, usage }, began, first) {
  const ended = performance.now();
  const parts = [`first token ${duration(((first ?? ended) - began) / 1000)}`];
  const tokens = usage?.completion_tokens ?? 0;
  if (first && tokens > 1) parts.push(`${figure((tokens - 1) / Math.max((ended - first) / 1000, 1e-6))} tokens/s`);
  if (usage) parts.push(`${usage.prompt_tokens} + ${tokens} tokens`);
  const cached = usage?.prompt_tokens_details?.cached_tokens ?? 0;
  if (cached) parts.push(`${cached} from the cache`);
  if (finish) parts.push(finish === "length" ? "ended at the token limit" : "ended by itself");
  return parts.join(" · ");
}

function busy(on) {
  $("send").disabled = on;
  $("stop").disabled = !on;
  $("again").disabled = on || !turns.some((turn) => turn.role === "user");
  $("turns").setAttribute("aria-busy", String(on));
  curl();
}

function submit() {
  const text = $("text").value;
  if (going || text === "" || !$("settings").reportValidity()) return;
  turns.push({ role: "user", text });
  append(show("user"), { text: text.trim() || text, sure: 3 });
  $("text").value = "";
  answer();
}

function again() {
  while (turns.length && turns.at(-1).role === "assistant") {
    turns.pop();
    $("turns").lastElementChild.remove();
  }
  answer();
}

function clear() {
  going?.abort();
  turns.length = 0;
  $("turns").replaceChildren();
  busy(false);
}

// --- the server ---

function curl() {
  try {
    const draft = $("text").value;
    const { route, body } = request(card.id, settings(), draft ? [...turns, { role: "user", text: draft }] : turns);
    const quoted = JSON.stringify(body, null, 1).replaceAll("'", "'\\''");
    $("curl").textContent = `curl -N ${location.origin}${route} -H 'Content-Type: application/json' -d '${quoted}'`;
  } catch (error) {
    $("curl").textContent = error.message;
  }
}

async function describe() {
  const listed = await (await fetch("/v1/models")).json();
  card = listed.data[0];
  document.title = `${card.id} · quantlab`;
  $("model").textContent = card.id;
  const facts = [card.scheme, card.device, card.max_model_len && `${card.max_model_len.toLocaleString("en")} tokens`];
  $("facts").textContent = facts.filter(Boolean).join(" · ");
  $("facts").title = (card.kernels ?? []).join("\n");
  const mode = fields.get("mode");
  mode.querySelector('[value="chat"]').disabled = card.chat_template === false;
  if (card.chat_template === false) mode.value = "text";
  changed();
}

async function watch() {
  let phase = "no answer";
  try {
    const response = await fetch("/ready");
    phase = response.ok ? "ready" : ((await response.json()).status ?? `HTTP ${response.status}`);
    if (response.ok && !card.id) await describe();
  } catch {
    // No answer: that is the phase.
  }
  $("phase").textContent = phase;
  $("status").className = phase === "ready" ? "ready" : ["dead", "no answer"].includes(phase) ? "gone" : "";
  setTimeout(watch, document.hidden ? 10000 : 2000);
}

async function metrics() {
  const response = await fetch("/metrics");
  if (!response.ok) throw new Error(`HTTP ${response.status}`);
  return response.text();
}

$("ask").addEventListener("submit", (event) => (event.preventDefault(), submit()));
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("settings").addEventListener("input", changed);
$("text").addEventListener("input", curl);
$("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
$("stop").addEventListener("click", () => going?.abort());
$("again").addEventListener("click", again);
$("clear").addEventListener("click", clear);
$("copy").addEventListener("click", () => navigator.clipboard?.writeText($("curl").textContent));
restore();
changed();
watch();
start($("plots"), metrics);
