// A sweep: the metric over one axis, another as colour, every seed a dot, its parabola and optimum.
import { html } from "/static/preact-htm.js";
import { change, getJson, search, useLive } from "/static/api.js";
import { Lines } from "/static/charts.js";
import { color, label, measure, short } from "/static/format.js";
import { Badge, Failed, Legend, Link, useKeys } from "/static/parts.js";

const finite = (v) => typeof v === "number" && Number.isFinite(v);

export function Sweep({ id, query, data }) {
  const ids = data.runs.filter((r) => r.memberships.some(([e]) => e === id)).map((r) => r.id);
  const { axis, hue, metric } = query, asked = search({ axis, hue, metric });
  const state = useLive(id + asked, () => getJson(`/api/sweep/${id}?${asked}`), (event) => event.records || event.runs.some((r) => ids.includes(r)));
  useKeys({ l: () => change({ log: query.log === "off" ? "" : "off" }) });
  if (!state.data || state.error) return html`<${Failed} state=${state} />`;
  const e = state.data;
  if (!e.axes.length) return html`<p class="empty">The arms of <${Link} to=${"/experiment/" + id}>${id}<//> have no places on axes: it is no sweep.</p>`;
  if (!e.lines.length) {
    return html`<div class="eyebrow">sweep · <${Link} to=${"/experiment/" + id}>${id}<//></div><h1>${e.hypotheses[0].statement}</h1>
      <p class="empty">No run of it has begun.</p>`;
  }
  const pick = (name, value, of) => html`<label>${name} <select value=${value} onChange=${(event) => change({ [name]: event.target.value })}>
    ${of.map((one) => html`<option value=${one} selected=${one === value}>${one}</option>`)}</select></label>`;
  const log = query.log !== "off" && !e.octaves;
  const places = [...new Set(e.lines.map((line) => line.panel))];
  const hues = [...new Set(e.lines.map((line) => line.hue))].sort(order);
  const values = e.lines.flatMap((line) => line.points.flatMap((p) => p.runs.map((r) => r.value))).filter(finite);
  const [least, most] = [Math.min(...values), Math.max(...values)], pad = 0.08 * (most - least) || 0.05 * Math.abs(most) || 1;
  const yRange = places.length > 1 && values.length ? [least - pad, most + pad] : undefined;  // side by side: one scale
  return html`<div class="eyebrow">sweep · <${Link} to=${"/experiment/" + id}>${id}<//></div><h1>${e.hypotheses[0].statement}</h1>
    <p><${Badge} kind=${e.verdict || e.status} /> ${e.reason || "There is no conclusion yet."}</p>
    <div class="bar">${pick("axis", e.axis, e.axes)} ${e.hue && pick("hue", e.hue, e.axes.filter((one) => one !== e.axis))}
      ${pick("metric", e.metric, e.metrics.length ? e.metrics : [e.metric])}
      ${!e.octaves && html`<button class=${log ? "on" : ""} onClick=${() => change({ log: query.log === "off" ? "" : "off" })}>log ${e.axis}</button>`}</div>
    ${e.hue && html`<${Legend} entries=${hues.map((h, i) => [`${e.hue} ${h}`, color(i)])} />`}
    <p class="soft">A dot is a run, dashed its seed's parabola over ${e.octaves ? "" : "log₂ of "}${e.axis}, an upright its optimum.</p>
    <div class=${places.length > 1 ? "panels" : ""}>${places.map((place) => html`<${Points} key=${place} ...${{ e, place, hues, log, yRange }}
      title=${[e.panel && placeName(place), label(e.metric)].filter(Boolean).join(": ")} tall=${places.length > 1 ? 260 : 360} />`)}</div>
    <h2>Optima</h2><${Optima} e=${e} hues=${hues} />
    <h2>Conclusion</h2><${Conclusion} e=${e} />`;
}

const order = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a) < String(b) ? -1 : 1);
const CONTROLS = { off: "without the rule", embed_only: "with the embedding's factor alone" };
const placeName = (place) => (place in CONTROLS ? `control: ${CONTROLS[place]}` : String(place));

function Points({ e, place, hues, log, yRange, title, tall }) {
  const of = e.lines.filter((line) => line.panel === place);
  const every = [...new Set(of.flatMap((line) => line.points.map((p) => p.x)))].sort(order);
  const numeric = every.every((v) => typeof v === "number" && (!log || v > 0));
  const at = (v) => (numeric ? (log ? Math.log2(v) : v) : every.indexOf(v));
  const fits = numeric && (log || e.octaves) ? of.filter((line) => line.fit) : [];
  const low = at(every[0]), high = at(every[every.length - 1]);
  const fine = fits.length ? Array.from({ length: 61 }, (_, i) => low + ((high - low) * i) / 60) : [];
  const grid = Float64Array.from([...new Set([...every.map(at), ...fine])].sort((a, b) => a - b));
  const tone = (line) => color(hues.indexOf(line.hue));
  const dots = of.flatMap((line) => {
    const seeds = [...new Set(line.points.flatMap((p) => p.runs.map((r) => r.seed)))].sort((a, b) => a - b);
    return seeds.map((seed) => {
      const by = new Map(line.points.map((p) => [at(p.x), p.runs.find((r) => r.seed === seed)?.value]));
      return { y: Array.from(grid, (u) => (finite(by.get(u)) ? by.get(u) : null)), label: `${e.hue ? `${e.hue} ${line.hue}, ` : ""}seed ${seed}`,
        color: tone(line), dash: [], width: line.fit && fits.length ? 0 : 1, points: true };
    });
  });
  const parabolas = fits.flatMap((line) => Object.entries(line.fit.optima).filter(([seed]) => finite(line.fit.levels[seed])).map(([seed, best]) => ({
    y: Array.from(grid, (u) => (Math.abs(u - line.fit.best) <= 2.01 ? line.fit.levels[seed] + line.fit.curvature * (u - best) ** 2 : null)),
    label: "", color: tone(line), dash: [5, 4], width: 1, mute: true, points: false })));
  const marks = fits.flatMap((line) => Object.values(line.fit.optima).filter(finite).map((best) => ({ x: best, color: tone(line) })));
  const text = (v) => (numeric ? short(log ? 2 ** v : v, 3) : String(every[Math.round(v)] ?? ""));
  const pad = 0.05 * (high - low || 1);
  return html`<${Lines} title=${title} x=${grid} curves=${[...dots, ...parabolas]} height=${tall} xText=${text} marks=${marks}
    splits=${() => every.map(at)} range=${[low - pad, high + pad]} yRange=${yRange} />`;
}

function Optima({ e, hues }) {
  const of = e.measures[e.metric], sign = of?.better === "higher" ? -1 : 1;
  const show = (v) => (of ? measure(of, v) : short(v));
  const rows = [...e.lines].sort((a, b) => order(a.panel, b.panel) || hues.indexOf(a.hue) - hues.indexOf(b.hue)).map((line) => {
    const means = line.points.map((p) => {
      const known = p.runs.map((r) => r.value).filter(finite);
      return [p.x, known.length ? known.reduce((a, b) => a + b, 0) / known.length : NaN];
    }).filter(([, v]) => finite(v));
    const best = means.length ? means.reduce((a, b) => (sign * b[1] < sign * a[1] ? b : a)) : null;
    const optima = line.fit ? Object.values(line.fit.optima).filter(finite) : [];
    const middle = optima.length ? optima.reduce((a, b) => a + b, 0) / optima.length : NaN;
    const edge = best && (best === means[0] || best === means[means.length - 1]);
    return html`<tr>${e.panel && html`<td>${placeName(line.panel)}</td>`}<td>${line.hue}</td>
      <td class="num">${best ? (typeof best[0] === "number" ? short(best[0], 4) : best[0]) : "—"}</td><td class="num">${best ? show(best[1]) : "—"}</td>
      <td class="num">${finite(middle) ? short(e.octaves ? middle : 2 ** middle, 3) : "—"}</td>
      <td class="num">${line.fit ? short(line.fit.curvature, 3) : "—"}</td><td class="num">${finite(line.fit?.noise) ? short(line.fit.noise, 2) : "—"}</td>
      <td class="num">${line.points.reduce((n, p) => n + p.runs.length, 0)}</td><td>${edge ? "at an edge: extend the grid" : ""}</td></tr>`;
  });
  return html`<table data-optima=${rows.length}><thead><tr>${e.panel && html`<th>${e.panel}</th>`}<th>${e.hue || ""}</th><th class="num">${e.axis} of the best run</th>
      <th class="num">${of?.label || e.metric}</th><th class="num">optimum of parabolas</th><th class="num">curvature, per octave²</th><th class="num">noise</th><th class="num">runs</th><th></th></tr></thead>
    <tbody>${rows}</tbody></table>`;
}

// What the judge of a transfer found: of each group of rates, and of each control.
function Conclusion({ e }) {
  const found = e.conclusion || {};
  const groups = [...(found.groups || []), ...(found.controls || [])];
  const plus = (i, digits) => (!i || !finite(i.mean) ? "—" : html`${short(i.mean, digits)}${finite(i.low) && finite(i.high)
    ? html`<span class="soft"> [${short(i.low, digits)}, ${short(i.high, digits)}]</span>` : ""}`);
  return html`${groups.length > 0 && html`<table data-groups=${groups.length}><thead><tr><th>rates</th><th>state</th><th class="num">shift, octaves [95 %]</th>
      <th class="num">regret, nats [95 %]</th><th>why</th></tr></thead><tbody>${groups.map((g) => html`<tr><td>${placeName(g.name)}</td><td><b>${g.state || "measured"}</b></td>
      <td class="num">${plus(g.shift, 3)}</td><td class="num">${plus(g.regret, 2)}</td><td class="wrap soft">${g.reason}</td></tr>`)}</tbody></table>`}
    ${groups.length === 0 && html`<p class="soft">${e.reason || "None yet."}</p>`}
    ${Object.keys(found).length > 0 && html`<details><summary>all numbers</summary><pre>${JSON.stringify(found, null, 2)}</pre></details>`}`;
}
