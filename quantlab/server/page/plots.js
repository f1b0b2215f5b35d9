// What the server counts, read from /metrics every second and drawn: text, first tokens, requests, cache.
// Knows nothing about the conversation.

const KEPT = 120; // seconds on a plot
const WINDOW = 15; // seconds that a rate or a quantile looks back
const SVG = "http://www.w3.org/2000/svg";
const LINE = /^(?:[a-z_]+:)?([a-zA-Z0-9_]+)(?:\{(.*)\})? (\S+)$/;
const BOUND = /(?:^|,)le="([^"]+)"/;

export const PLOTS = [
  { title: "Output tokens/s", of: (m) => [rate(m, "generation_tokens_total")], show: figure },
  { title: "Prompt tokens/s", of: (m) => [rate(m, "prompt_tokens_total")], show: figure },
  { title: "Time to first token", of: (m) => [median(m, "time_to_first_token_seconds_bucket")], show: duration },
  { title: "Time between tokens", of: (m) => [median(m, "inter_token_latency_seconds_bucket")], show: duration },
  { title: "Running, waiting", of: (m) => [now(m, "num_requests_running"), now(m, "num_requests_waiting")], show: figure },
  { title: "KV cache in use", of: (m) => [now(m, "kv_cache_usage_perc")], show: percent, top: 1 },
  { title: "Prefix cache hits", of: (m) => [hits(m)], show: percent, top: 1 },
  { title: "Preemptions", of: (m) => [now(m, "num_preemptions_total")], show: figure },
];

/** The values of a Prometheus page: name -> sum over its labels, and for buckets name -> Map(bound -> count). */
export function parse(text) {
  const values = new Map();
  for (const line of text.split("\n")) {
    const found = line.startsWith("#") ? null : LINE.exec(line);
    if (!found) continue;
    const [, name, labels, value] = found;
    const bound = BOUND.exec(labels ?? "");
    if (bound) {
      const buckets = values.get(name) ?? new Map();
      buckets.set(bound[1], (buckets.get(bound[1]) ?? 0) + Number(value));
      values.set(name, buckets);
    } else {
      values.set(name, (values.get(name) ?? 0) + Number(value));
    }
  }
  return values;
}

/** Draws PLOTS into `place` and adds a sample a second; `read` gives the text of /metrics or throws. */
export function start(place, read) {
  const samples = [];
  const drawn = PLOTS.map((plot) => frame(place, plot));
  const tick = async () => {
    if (!document.hidden) {
      try {
        samples.push({ at: performance.now() / 1000, values: parse(await read()) });
        if (samples.length > KEPT + WINDOW) samples.shift();
        drawn.forEach((draw) => draw(samples));
      } catch {
        // The server is away; the status line says so, and the plots go on when it is back.
      }
    }
    setTimeout(tick, 1000);
  };
  tick();
}

function frame(place, plot) {
  const caption = element("figcaption", plot.title);
  const value = element("b", "–");
  const drawing = document.createElementNS(SVG, "svg");
  drawing.setAttribute("viewBox", "0 0 100 44");
  drawing.setAttribute("preserveAspectRatio", "none");
  drawing.setAttribute("role", "img");
  const figure = document.createElement("figure");
  figure.append(caption, value, drawing);
  place.append(figure);
  const history = [];
  return (samples) => {
    history.push(plot.of(samples));
    if (history.length > KEPT) history.shift();
    const latest = history.at(-1);
    value.textContent = latest.map((each) => (each === null ? "–" : plot.show(each))).join(" / ");
    drawing.setAttribute("aria-label", `${plot.title}, the last two minutes, now ${value.textContent}`);
    drawing.replaceChildren(baseline(), ...latest.map((_, index) => line(history, index, plot.top)));
  };
}

function line(history, index, top) {
  const highest = top ?? Math.max(...history.flat().map((each) => each ?? 0), 1e-9);
  const points = history
    .map((values, step) => [100 - (history.length - 1 - step) * (100 / (KEPT - 1)), values[index]])
    .filter(([, value]) => value !== null)
    .map(([x, value]) => `${x.toFixed(2)},${(42 - 39 * (value / highest)).toFixed(2)}`);
  const drawn = document.createElementNS(SVG, "polyline");
  drawn.setAttribute("class", `k${index}`);
  drawn.setAttribute("points", points.join(" "));
  return drawn;
}

function baseline() {
  const drawn = document.createElementNS(SVG, "line");
  for (const [name, value] of Object.entries({ x1: 0, y1: 43, x2: 100, y2: 43 })) drawn.setAttribute(name, value);
  return drawn;
}

function now(samples, name) {
  return samples.at(-1).values.get(name) ?? null;
}

function before(samples) {
  return samples.at(-1 - Math.min(WINDOW, samples.length - 1));
}

/** How much a counter grew, never less than nothing: a restarted server begins at zero. */
function growth(samples, name) {
  const [then, latest] = [before(samples).values.get(name), now(samples, name)];
  return latest === null ? null : Math.max(0, latest - (then ?? 0));
}

function rate(samples, name) {
  const seconds = samples.at(-1).at - before(samples).at;
  const grown = growth(samples, name);
  return grown === null || seconds <= 0 ? null : grown / seconds;
}

function hits(samples) {
  const queries = growth(samples, "prefix_cache_queries_total");
  return queries ? growth(samples, "prefix_cache_hits_total") / queries : null;
}

/** The median of what a histogram took in lately, on a line through its bucket; null if that was nothing. */
export function median(samples, name) {
  const [then, latest] = [before(samples).values.get(name), now(samples, name)];
  if (!(latest instanceof Map)) return null;
  const words = [...latest.keys()].sort((a, b) => limit(a) - limit(b));
  const bounds = words.map(limit);
  const counts = words.map((word) => latest.get(word) - (then?.get(word) ?? 0));
  const total = counts.at(-1) ?? 0;
  if (!(total > 0)) return null;
  const place = counts.findIndex((count) => count >= total / 2);
  const [low, less] = place ? [bounds[place - 1], counts[place - 1]] : [0, 0];
  if (!Number.isFinite(bounds[place])) return low;
  return low + ((bounds[place] - low) * (total / 2 - less)) / Math.max(counts[place] - less, 1);
}

function limit(word) {
  return word === "+Inf" ? Infinity : Number(word);
}

export function figure(value) {
  return value >= 100 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)));
}

export function duration(seconds) {
  return seconds < 1 ? `${figure(seconds * 1000)} ms` : `${figure(seconds)} s`;
}

function percent(share) {
  return `${Math.round(100 * share)} %`;
}

function element(tag, text) {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
}
