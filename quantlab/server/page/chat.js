// One request to the server: the body that the settings make, and its answer as a stream.
// Knows nothing about the page.

/** What the page can set: `neutral` values are not sent. */
export const SETTINGS = [
  { name: "max_tokens", label: "Most tokens", kind: "number", min: 1, max: 1000000, step: 1, value: 256 },
  { name: "temperature", label: "Temperature", kind: "number", min: 0, max: 2, step: 0.05, value: 0.8, hint: "0: always the likeliest" },
  { name: "top_p", label: "Top p", kind: "number", min: 0.01, max: 1, step: 0.01, value: 1, neutral: 1 },
  { name: "top_k", label: "Top k", kind: "number", min: 0, max: 100000, step: 1, value: 0, neutral: 0, hint: "0: all" },
  { name: "min_p", label: "Min p", kind: "number", min: 0, max: 1, step: 0.01, value: 0, neutral: 0 },
  { name: "repetition_penalty", label: "Repetition penalty", kind: "number", min: 0.01, max: 10, step: 0.01, value: 1, neutral: 1 },
  { name: "presence_penalty", label: "Presence penalty", kind: "number", min: -2, max: 2, step: 0.1, value: 0, neutral: 0 },
  { name: "frequency_penalty", label: "Frequency penalty", kind: "number", min: -2, max: 2, step: 0.1, value: 0, neutral: 0 },
  { name: "seed", label: "Seed", kind: "number", min: 0, max: 2147483647, step: 1, value: "", hint: "the same text again" },
  { name: "mode", label: "Mode", kind: "choice", choices: { chat: "chat", text: "continue a text" }, value: "chat" },
  { name: "stop", label: "Stop at", kind: "lines", value: "", hint: "texts that end an answer, one a line" },
  { name: "system", label: "System message", kind: "lines", value: "", only: "chat" },
  { name: "format", label: "Answer as", kind: "choice", choices: { text: "text", json_object: "any JSON object", json_schema: "JSON after a schema" }, value: "text" },
  { name: "schema", label: "JSON schema", kind: "lines", value: "" },
  { name: "certainty", label: "Underline uncertain words", kind: "check", value: false },
];

const SENT = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed"];

/** Route and body for the turns so far; throws with a sentence for settings that cannot be meant. */
export function request(model, settings, turns) {
  const body = { model, stream: true, stream_options: { include_usage: true } };
  for (const each of SETTINGS) {
    const value = settings[each.name];
    if (SENT.includes(each.name) && value !== "" && value !== each.neutral) body[each.name] = value;
  }
  const stops = settings.stop.split("\n").filter((line) => line !== "");
  if (stops.length) body.stop = stops;
  if (settings.format !== "text") body.response_format = format(settings);
  if (settings.mode === "text") {
    body.prompt = turns.map((turn) => turn.text).join("");
    if (settings.certainty) body.logprobs = 3;
    return { route: "/v1/completions", body };
  }
  const messages = turns.map((turn) => ({ role: turn.role, content: turn.text }));
  body.messages = settings.system ? [{ role: "system", content: settings.system }, ...messages] : messages;
  if (settings.certainty) Object.assign(body, { logprobs: true, top_logprobs: 3 });
  return { route: "/v1/chat/completions", body };
}

function format(settings) {
  if (settings.format === "json_object") return { type: "json_object" };
  try {
    return { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(settings.schema) } };
  } catch (error) {
    throw new Error(`The JSON schema is no JSON: ${error.message}`);
  }
}

/** Sends a request; `told` gets each piece ({text, sure, tip}); returns {finish, usage}. Throws what went wrong. */
export async function send({ route, body }, signal, told) {
  const response = await fetch(route, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw new Error(await reason(response));
  const end = { finish: null, usage: null };
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return end;
    const event = JSON.parse(data);
    if (event.error) throw new Error(event.error.message);
    if (event.usage) end.usage = event.usage;
    const choice = event.choices?.[0];
    if (!choice) continue;
    const text = choice.delta?.content ?? choice.text ?? "";
    if (text) told({ text, ...certainty(choice.logprobs) });
    end.finish = choice.finish_reason ?? end.finish;
  }
  throw new Error("The connection ended early.");
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `HTTP ${response.status}`;
  }
}

/** The data of each server-sent event of a body. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}

/** How sure the model was of a piece, 0 (under one in ten) to 3 (over one in two), and what else it considered. */
function certainty(logprobs) {
  const tokens = logprobs?.content?.map((each) => [each.logprob, each.top_logprobs.map((top) => [top.token, top.logprob])])
    ?? logprobs?.token_logprobs?.map((each, index) => [each, Object.entries(logprobs.top_logprobs?.[index] ?? {})]);
  if (!tokens?.length) return { sure: 3, tip: "" };
  const least = Math.min(...tokens.map(([logprob]) => logprob ?? 0));
  const sure = [0.1, 0.25, 0.5].filter((share) => Math.exp(least) >= share).length;
  const tops = tokens.flatMap(([, top]) => top.map(([token, logprob]) => `${JSON.stringify(token)} ${share(logprob)}`));
  return { sure, tip: `${share(least)}; ${tops.join(", ")}` };
}

function share(logprob) {
  return `${(100 * Math.exp(logprob)).toPrecision(2)} %`;
}
