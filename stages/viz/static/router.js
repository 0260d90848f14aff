// Where tokens went: every MoE layer over time, then the experts of one layer.
import { html } from "/static/preact-htm.js";
import { change, getJson, getExperts, getSeries, hits, search, useLive } from "/static/api.js";
import { HeatMap, Lines, apart, around, rising } from "/static/charts.js";
import { color, counted, noun, short, whole, xText } from "/static/format.js";
import { CurveBar, Facts, Failed, Legend, Troubles, curveKeys, curveProps, seriesQuery, useKeys } from "/static/parts.js";

const HEALTH = ["load_max_over_mean", "load_p05", "load_p50", "load_p95", "dead", "entropy", "bias_range"];
const PIXELS = 500;
const LEAST_TOP = 2;  // of the layers' scale, × mean: so that a balanced run looks balanced

export const layersOf = (tags) => [...new Set(tags.filter((tag) => /^moe\/\d+\/load_max_over_mean$/.test(tag))
  .map((tag) => +tag.split("/")[1]))].sort((a, b) => a - b);

export function Router({ id, query }) {
  const about = useLive(id, () => getJson(`/api/run/${id}`), hits([id]));
  if (!about.data || about.error) return html`<${Failed} state=${about} />`;
  const layers = layersOf(about.data.tags);
  if (!layers.length) {
    return html`<h1>Router of <span class="mono">${id}</span></h1><${Troubles} ids=${[id]}><p class="empty">None of the
      ${" "}${counted(about.data.tags.length, "tag")} that it logged is the load of a MoE layer: its model has none, or an
      older version of nmoe wrote it.</p><//>`;
  }
  return html`<${Layers} id=${id} query=${query} layers=${layers} tags=${about.data.tags} names=${about.data.experts} />`;
}

function Layers({ id, query, layers, tags, names }) {
  const layer = layers.includes(+query.layer) ? +query.layer : layers[0];
  const wanted = layers.map((l) => `moe/${l}/load_max_over_mean`);
  const asked = { run: id, tag: wanted, px: PIXELS, ...seriesQuery(query) };
  const state = useLive(search(asked), () => getSeries(asked), hits([id]));
  const pick = (by) => change({ layer: layers[Math.min(Math.max(layers.indexOf(layer) + by, 0), layers.length - 1)] });
  useKeys({ ...curveKeys(query), j: () => pick(1), k: () => pick(-1), ArrowDown: () => pick(1), ArrowUp: () => pick(-1) });
  if (!state.data || state.error) return html`<${Failed} state=${state} />`;
  const panels = state.data, x = panels[0].x, kind = query.x || "tokens";
  const at = (r, k) => panels[r].curves[0]?.y[k] ?? NaN;
  const last = panels.map((p) => p.curves[0]?.last?.[1]);
  const worst = last.indexOf(Math.max(...last.filter(Number.isFinite)));
  const top = panels.reduce((most, p) => (p.curves[0]?.y || []).reduce((a, v) => (v > a && v < Infinity ? v : a), most), LEAST_TOP);
  return html`<h1>Router of <span class="mono">${id}</span></h1>
    <${Troubles} ids=${[id]} />
    <${CurveBar} query=${query}><span class="soft">layers: <kbd>j</kbd> <kbd>k</kbd> or a click</span><//>
    <${Facts} pairs=${[[noun(layers.length, "MoE layer"), layers.length], ["fullest expert over mean now", short(last[worst], 3)],
      ["in this layer", layers[worst] ?? "—"], ["layer shown below", layer]]} />
    <${HeatMap} title="fullest expert over mean, by layer" note="" scale=${["1, balanced", `${short(top, 3)} × mean, log scale`]}
      rows=${layers.length} columns=${x.length} value=${at} shade=${(v) => Math.log2(v) / Math.log2(top)} stops=${rising()} cell=${18}
      rowLabel=${(r) => `layer ${layers[r]}`} columnLabel=${(k) => xText(kind, x[k], 3)} picked=${layers.indexOf(layer)}
      onPick=${(r) => change({ layer: layers[r] })}
      tip=${(r, k) => `layer ${layers[r]} at ${xText(kind, x[k])}: ${short(at(r, k), 4)}`} />
    <h2>Layer ${layer}</h2>
    <${Experts} id=${id} layer=${layer} names=${names} />
    <${Health} id=${id} layer=${layer} query=${query} tags=${tags} />`;
}

// Of each kind of map: its title, a value's place in 0..1 given the mean of its step, and its words.
const ratio = (v, mean) => 0.5 + 0.5 * Math.max(-1, Math.min(1, Math.log2(Math.max(v / mean, 0.01)) / 2));
const KINDS = {
  count: ["load of each expert over the mean", ratio, "tokens", ["≤ ¼", "≥ 4 × mean"]],
  gate: ["sum of an expert's gates over the mean, sampled", ratio, "× mean", ["≤ ¼", "≥ 4 × mean"]],
  bias: ["bias of each expert in the router's choice", null, "", null],
};

function Experts({ id, layer, names }) {
  const kinds = ["count", "gate", "bias"].filter((kind) => names.includes(kind));
  const sources = names.filter((name) => name.startsWith("source "));
  if (!kinds.length) return html`<p class="soft" data-loads="none">This run did not log the load of each expert.</p>`;
  return html`${kinds.map((kind) => html`<${ExpertMap} key=${kind} ...${{ id, layer, kind }} />`)}
    ${sources.length ? html`<${Sources} ...${{ id, layer, sources }} />` : html`<p class="soft">Where each source's tokens
      go is sampled by <code>[train] routing_every = 100</code>; this run does not.</p>`}`;
}

function ExpertMap({ id, layer, kind }) {
  const asked = { run: id, layer, of: kind, px: PIXELS };
  const state = useLive(search(asked), () => getExperts(asked), hits([id]));
  if (!state.data || state.error) return html`<${Failed} state=${state} />`;
  const { n, experts, steps, values } = state.data;
  if (!n) return null;
  const [title, place, unit, ends] = KINDS[kind];
  const most = values.reduce((a, v) => (Number.isFinite(v) ? Math.max(a, Math.abs(v)) : a), 1e-9);
  const means = Float64Array.from(steps, (_, k) => {
    let sum = 0;
    for (let e = 0; e < experts; e++) sum += values[k * experts + e];
    return sum / experts;
  });
  const at = (e, k) => values[k * experts + e];
  const over = (e, k) => (means[k] ? at(e, k) / means[k] : NaN);
  const dead = [];
  for (let e = 0; e < experts; e++) if (kind === "count" && over(e, n - 1) < 0.01) dead.push(e);
  const now = Array.from({ length: experts }, (_, e) => at(e, n - 1));
  const note = kind === "count" ? `dead now: ${dead.length ? dead.join(", ") : "none"}`
    : kind === "bias" ? `now ${short(Math.min(...now), 3)} to ${short(Math.max(...now), 3)}` : "";
  const tip = (e, k) => `expert ${e} at step ${whole(steps[k])}: ${short(at(e, k), 4)} ${unit}${
    kind === "count" ? `, ${short(over(e, k), 3)} × mean` : ""}`;
  return html`<${HeatMap} title=${title} rows=${experts} columns=${n} note=${note} stops=${around()}
    value=${place ? over : at} shade=${(v) => (place ? place(v, 1) : 0.5 + (0.5 * v) / most)}
    scale=${ends || [short(-most, 2), `+${short(most, 2)}`]} rowLabel=${(e) => `${e}`}
    columnLabel=${(k) => `step ${short(steps[k], 4)}`} cell=${10} max=${kind === "count" ? 460 : 300} tip=${tip} />`;
}

// Sources × experts at the newest sampled step: how much more of a source's tokens an expert gets.
function Sources({ id, layer, sources }) {
  const asked = { run: id, layer, px: PIXELS };
  const state = useLive(search({ ...asked, of: sources }), () => Promise.all(sources.map((of) => getExperts({ ...asked, of }))), hits([id]));
  if (!state.data || state.error) return html`<${Failed} state=${state} />`;
  const known = state.data.map((map, i) => [sources[i].replace("source ", ""), map]).filter(([, map]) => map.n);
  if (!known.length) return null;
  const { experts } = known[0][1];
  const rows = known.map(([, map]) => map.values.subarray((map.n - 1) * experts));
  const totals = rows.map((row) => row.reduce((a, v) => a + v, 0));
  const step = known[0][1].steps[known[0][1].n - 1];
  const at = (r, e) => (totals[r] ? (rows[r][e] * experts) / totals[r] : NaN);
  return html`<${HeatMap} title="each source's tokens by expert, over an even share" note=${`sampled at step ${whole(step)}`}
    rows=${known.length} columns=${experts} value=${at} shade=${(v) => ratio(v, 1)} stops=${around()} cell=${22} scale=${["≤ ¼", "≥ 4 × even"]}
    left=${known.reduce((n, [name]) => Math.max(n, name.length), 0) * 6.5 + 14} rowLabel=${(r) => known[r][0]} columnLabel=${(e) => `${e}`}
    tip=${(r, e) => `${known[r][0]} → expert ${e}: ${short(rows[r][e])} of its ${short(totals[r])} choices, ${short(at(r, e), 3)} × even`} />`;
}

const WORDS = { load_p05: "5th percentile", load_p50: "median", load_p95: "95th percentile", load_max_over_mean: "fullest" };
const GROUPS = [
  ["load over mean: percentiles and fullest", ["load_p05", "load_p50", "load_p95", "load_max_over_mean"]],
  ["dead experts (below 1 % of the mean)", ["dead"]],
  ["entropy of the load, 1 is balanced", ["entropy"]],
  ["range of the router's bias", ["bias_range"]],
];

function Health({ id, layer, query, tags }) {
  const wanted = HEALTH.map((name) => `moe/${layer}/${name}`).filter((tag) => tags.includes(tag));
  const asked = { run: id, tag: wanted, px: PIXELS, ...seriesQuery(query) };
  const state = useLive(search(asked), () => getSeries(asked), hits([id]));
  if (!state.data || state.error) return html`<${Failed} state=${state} />`;
  const panels = Object.fromEntries(state.data.map((p) => [p.tag, p]));
  const drawn = GROUPS.map(([title, names]) => [title, names.map((name) => panels[`moe/${layer}/${name}`]).filter((p) => p?.x.length)]);
  return html`<div class="panels" data-ready="yes">${drawn.filter(([, of]) => of.length).map(([title, of]) => {
    const curves = apart(of.map((p, i) => ({ y: p.curves[0].y, label: WORDS[p.tag.split("/")[2]] || title, color: color(i), dash: [] })));
    return html`<div><${Lines} key=${title + layer} title=${title} x=${of[0].x} curves=${curves} whole=${/^dead/.test(title)} ...${curveProps(query)} />
      ${curves.length > 1 && html`<${Legend} entries=${curves.map((c) => [c.label, c.color, c.dash])} />`}</div>`;
  })}</div>`;
}
