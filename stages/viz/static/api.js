// What the server is asked, and how its answers are read. State lives in the URL.
import { useEffect, useReducer, useRef, useState } from "/static/preact-htm.js";
import { X_NAMES } from "/static/format.js";

export async function getJson(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error((await answer.text()) || answer.statusText);
  return answer.json();
}

async function getColumns(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error((await answer.text()) || answer.statusText);
  const body = await answer.arrayBuffer();
  const length = new DataView(body).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(body, 4, length)));
  return [header, body, 4 + length];
}

// Tags that are shown in another unit than they are logged in: GiB, %.
const SHOWN = { "memory/peak_bytes": 2 ** -30, "train/mfu": 100 };

function shown(curve, factor) {
  curve.y = curve.y.map((v) => factor * v);
  if (typeof curve.last?.[1] === "number") curve.last[1] *= factor;
}

// [{tag, x: Float64Array, curves: [{run, last, y: Float32Array}]}]; raw: in the unit that was logged.
export async function getSeries(query, raw = false) {
  const [header, body, start] = await getColumns("/api/series?" + search(query));
  let at = start;
  for (const panel of header) {
    panel.x = new Float64Array(body, at, panel.length);
    at += 8 * panel.length;
  }
  for (const panel of header) {
    for (const curve of panel.curves) {
      curve.y = new Float32Array(body, at, panel.length);
      at += 4 * panel.length;
      if (panel.tag in SHOWN && !raw) shown(curve, SHOWN[panel.tag]);
    }
  }
  return header;
}

// {n, experts, steps: Float64Array, values: Float32Array [n * experts]}
export async function getExperts(query) {
  const [header, body, start] = await getColumns("/api/experts?" + search(query));
  const steps = new Float64Array(body, start, header.n);
  const values = new Float32Array(body, start + 8 * header.n, header.n * header.experts);
  return { ...header, steps, values };
}

// What stages/viz/ranks.py answers: its header; x by kind; delay, where, even: Float32Array [ranks * n].
export async function getRanks(query) {
  const [header, body, start] = await getColumns("/api/ranks?" + search(query));
  const { n, ranks } = header, m = n * ranks;
  const x = Object.fromEntries(["step", "tokens", "time"].map((kind, i) => [kind, new Float64Array(body, start + 8 * i * n, n)]));
  const [delay, where, even] = [0, 1, 2].map((i) => new Float32Array(body, start + 24 * n + 4 * i * m, m));
  return { ...header, x, delay, where, even };
}

export function search(query) {
  const out = new URLSearchParams();
  for (const [key, value] of Object.entries(query)) {
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== undefined && one !== null && one !== "") out.append(key, one);
    }
  }
  return out.toString().replaceAll("%2C", ",").replaceAll("%2F", "/");
}

// The page's address: where it is, and its query as an object. Every change redraws.
const listeners = new Set();
history.scrollRestoration = "manual";
addEventListener("popstate", ({ state }) => {
  redraw();
  until = Date.now() + 10000; // the data of a busy machine or a slow disk may take seconds
  restore(state?.y || 0);
});

// Scroll to where one left a page, once it is as high as it was, unless one has moved on.
let until = 0;
function restore(y) {
  scrollTo(0, y);
  if (Math.abs(scrollY - y) > 1 && Date.now() < until) requestAnimationFrame(() => restore(y));
}
for (const kind of ["wheel", "keydown", "pointerdown"]) addEventListener(kind, () => { until = 0; }, { passive: true });

export function go(path, replace = false) {
  until = 0;
  if (!replace) history.replaceState({ y: scrollY }, "");
  history[replace ? "replaceState" : "pushState"](null, "", path);
  if (!replace) scrollTo(0, 0);
  redraw();
}

export const redraw = () => listeners.forEach((f) => f());

export function useAddress() {
  const [, again] = useReducer((n) => n + 1, 0);
  useEffect(() => {
    listeners.add(again);
    return () => listeners.delete(again);
  }, []);
  return [location.pathname, sound(Object.fromEntries(new URLSearchParams(location.search)))];
}

// A query without what makes no sense: an address may be typed by hand.
export function sound({ x, from, to, at, ...rest }) {
  const [low, high] = [+from, +to], known = from && to && Number.isFinite(low) && Number.isFinite(high);
  if (Object.hasOwn(X_NAMES, x)) rest.x = x;
  if (known && high - low > 1e-12 * Math.max(Math.abs(low), Math.abs(high))) Object.assign(rest, { from, to });
  if (/^\d+$/.test(at)) rest.at = at;
  return rest;
}

// Names with commas between them; what every object has is no name.
export const listed = (text) => (text ? text.split(",").filter((name) => name && !(name in {})) : []);

export function change(values) {
  const query = { ...Object.fromEntries(new URLSearchParams(location.search)), ...values };
  const text = search(query);
  go(location.pathname + (text ? "?" + text : ""), true);
}

// What changed since: the server says it once a second, over one connection. A browser has six for a
// server, so a page that is not seen gives its own back; when it is seen again it asks for all anew.
const watchers = new Set();
let stream = null;

function listen() {
  if (document.hidden || !watchers.size || stream) return;
  stream = new EventSource("/api/events");
  stream.onmessage = (message) => watchers.forEach((f) => f(JSON.parse(message.data)));
  stream.onerror = () => watchers.forEach((f) => f({ records: false, runs: [], lost: true }));
}

function leave() {
  stream?.close();
  stream = null;
}

addEventListener("visibilitychange", () => (document.hidden ? leave() : listen()));
addEventListener("pagehide", leave);
addEventListener("pageshow", listen);

export function watch(f) {
  watchers.add(f);
  listen();
  return () => watchers.delete(f);
}

// The newest answer of `load` for a key, asked again when `concerns(event)`; one request at a time.
export function useLive(key, load, concerns) {
  const [state, setState] = useState({ key: null, data: null, error: "" });
  const latest = useRef({});
  latest.current = { load, concerns };
  useEffect(() => {
    let gone = false, busy = false, again = false;
    const ask = async () => {
      if (busy) { again = true; return; }
      busy = true;
      try {
        const data = await latest.current.load();
        if (!gone) setState({ key, data, error: "" });
      } catch (error) {
        if (!gone) setState((old) => ({ ...old, key, error: error.message }));
      }
      busy = false;
      if (again && !gone) { again = false; ask(); }
    };
    ask();
    const stop = watch((event) => !event.lost && latest.current.concerns(event) && ask());
    return () => { gone = true; stop(); };
  }, [key]);
  return state;
}

export const hits = (ids) => (event) => event.records || event.runs.some((id) => ids.includes(id));
