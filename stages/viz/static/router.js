// Where tokens went: every MoE layer over time, then the experts of one layer.
import { html } from "/static/preact-htm.js";
import { change, getJson, getLoads, getSeries, hits, search, useLive } from "/static/api.js";
import { HeatMap, Lines, around, rising } from "/static/charts.js";
import { color, short, xText } from "/static/format.js";
import { CurveBar, Facts, Failed, Legend, curveKeys, curveProps, seriesQuery, useKeys } from "/static/parts.js";

const HEALTH = ["load_max_over_mean", "load_p05", "load_p50", "load_p95", "dead", "entropy", "bias_range"];
const PIXELS = 500;

export const layersOf = (tags) => [...new Set(tags.filter((tag) => /^moe\/\d+\/load_max_over_mean$/.test(tag))
  .map((tag) => +tag.split("/")[1]))].sort((a, b) => a - b);

export function Router({ id, query }) {
  const about = useLive(id, () => getJson(`/api/run/${id}`), (event) => event.records);
  if (!about.data || about.error) return html`<${Failed} state=${about} />`;
  const layers = layersOf(about.data.tags);
  if (!layers.length) return html`<p class="empty">This run has no MoE layer that logged its load.</p>`;
  return html`<${Layers} id=${id} query=${query} layers=${layers} tags=${about.data.tags} />`;
}

function Layers({ id, query, layers, tags }) {
  const layer = layers.includes(+query.layer) ? +query.layer : layers[0];
  const wanted = layers.map((l) => `moe/${l}/load_max_over_mean`);
  const asked = { run: id, tag: wanted, px: PIXELS, ...seriesQuery(query) };
  const state = useLive(search(asked), () => getSeries(asked), hits([id]));
  const pick = (by) => change({ layer: layers[Math.min(Math.max(layers.indexOf(layer) + by, 0), layers.length - 1)] });
  useKeys({ ...curveKeys(query), j: () => pick(1), k: () => pick(-1), ArrowDown: () => pick(1), ArrowUp: () => pick(-1) });
  if (!state.data || state.error) return html`<${Failed} state=${state} />`;
  const panels = state.data, x = panels[0].x, kind = query.x || "tokens";
  const at = (r, k) => panels[r].curves[0]?.y[k] ?? NaN;
  const last = panels.map((p) => p.curves[0]?.last?.[1] ?? NaN);
  const worst = last.indexOf(Math.max(...last));
  return html`<h1>Router of <span class="mono">${id}</span></h1>
    <${CurveBar} query=${query}><span class="soft">layers: <kbd>j</kbd> <kbd>k</kbd> or a click</span><//>
    <${Facts} pairs=${[["MoE layers", layers.length], ["fullest expert over mean, worst layer now", short(last[worst], 3)],
      ["that layer", layers[worst]], ["layer shown below", layer]]} />
    <${HeatMap} title="fullest expert over mean, by layer" note="1 is balanced; the stronger the colour, the worse"
      rows=${layers.length} columns=${x.length} value=${at} shade=${(v) => (v - 1) / 3} stops=${rising()} cell=${18}
      rowLabel=${(r) => `layer ${layers[r]}`} columnLabel=${(k) => xText(kind, x[k], 2)} picked=${layers.indexOf(layer)}
      onPick=${(r) => change({ layer: layers[r] })}
      tip=${(r, k) => `layer ${layers[r]} at ${xText(kind, x[k])}: ${short(at(r, k), 4)}`} />
    <h2>Layer ${layer}</h2>
    <${Experts} id=${id} layer=${layer} />
    <${Health} id=${id} layer=${layer} query=${query} tags=${tags} />`;
}

function Experts({ id, layer }) {
  const asked = { run: id, layer, px: PIXELS };
  const state = useLive(search(asked), () => getLoads(asked), hits([id]));
  if (!state.data || state.error) return html`<${Failed} state=${state} />`;
  const { n, experts, steps, counts } = state.data;
  if (!n) return html`<p class="soft" data-loads="none">This run did not log the load of each expert.</p>`;
  const means = Float64Array.from(steps, (_, k) => {
    let sum = 0;
    for (let e = 0; e < experts; e++) sum += counts[k * experts + e];
    return sum / experts;
  });
  const at = (e, k) => (means[k] ? counts[k * experts + e] / means[k] : NaN);
  const dead = [];
  for (let e = 0; e < experts; e++) if (at(e, n - 1) < 0.01) dead.push(e);
  return html`<${HeatMap} title="load of each expert over the mean" rows=${experts} columns=${n} value=${at}
      note=${`blue above the mean, orange below · dead now: ${dead.length ? dead.join(", ") : "none"}`}
      shade=${(v) => 0.5 + 0.5 * Math.max(-1, Math.min(1, Math.log2(Math.max(v, 0.01)) / 2))} stops=${around()}
      rowLabel=${(e) => `${e}`} columnLabel=${(k) => `step ${short(steps[k], 2)}`} cell=${10} max=${460}
      tip=${(e, k) => `expert ${e} at step ${short(steps[k])}: ${short(counts[k * experts + e])} tokens, ${short(at(e, k), 3)} × mean`} />`;
}

const GROUPS = [
  ["load over mean: percentiles and fullest", ["load_p05", "load_p50", "load_p95", "load_max_over_mean"]],
  ["dead experts (below 1 % of the mean)", ["dead"]],
  ["entropy of the load, 1 is balanced", ["entropy"]],
  ["range of the router's bias", ["bias_range"]],
];

function Health({ id, layer, query, tags }) {
  const wanted = HEALTH.map((name) => `moe/${layer}/${name}`).filter((tag) => tags.includes(tag));
  const sources = tags.filter((tag) => tag.startsWith(`moe/${layer}/source/`));
  const asked = { run: id, tag: [...wanted, ...sources], px: PIXELS, ...seriesQuery(query) };
  const state = useLive(search(asked), () => getSeries(asked), hits([id]));
  if (!state.data || state.error) return html`<${Failed} state=${state} />`;
  const panels = Object.fromEntries(state.data.map((p) => [p.tag, p]));
  const drawn = GROUPS.map(([title, names]) => [title, names.map((name) => panels[`moe/${layer}/${name}`]).filter((p) => p?.x.length)]);
  if (sources.length) drawn.push(["entropy of the load, by source", sources.map((tag) => panels[tag])]);
  return html`<div class="panels" data-ready="yes">${drawn.filter(([, of]) => of.length).map(([title, of]) => {
    const curves = of.map((p, i) => ({ y: p.curves[0].y, label: p.tag.split("/").slice(2).join("/"), color: color(i), dash: [] }));
    return html`<div><${Lines} key=${title + layer} title=${title} x=${of[0].x} curves=${curves} ...${curveProps(query)} />
      ${curves.length > 1 && html`<${Legend} entries=${curves.map((c) => [c.label, c.color])} />`}</div>`;
  })}</div>`;
}
