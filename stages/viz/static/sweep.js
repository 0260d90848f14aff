// A sweep: the metric over one axis, another axis as colour, every seed a dot.
import { html } from "/static/preact-htm.js";
import { change, getJson, useLive } from "/static/api.js";
import { Lines } from "/static/charts.js";
import { COLORS, label, measure, short } from "/static/format.js";
import { Badge, Failed, Legend, Link, useKeys } from "/static/parts.js";

export function Sweep({ id, query, data }) {
  const ids = data.runs.filter((r) => r.memberships.some(([e]) => e === id)).map((r) => r.id);
  const state = useLive(id, () => getJson(`/api/experiment/${id}`), (event) => event.records || event.runs.some((r) => ids.includes(r)));
  useKeys({ l: () => change({ log: query.log === "off" ? "" : "off" }) });
  if (!state.data || state.error) return html`<${Failed} state=${state} />`;
  const e = state.data, axes = e.axes;
  if (!axes.length) return html`<p class="empty">The arms of <${Link} to=${"/experiment/" + id}>${id}<//> have no places on axes: it is no sweep.</p>`;
  const numeric = axes.filter((axis) => e.arms.every((arm) => typeof arm.point[axis] === "number"));
  const x = axes.includes(query.axis) ? query.axis : numeric.find((axis) => /lr|rate/.test(axis)) || numeric[0] || axes[0];
  const hue = axes.includes(query.hue) && query.hue !== x ? query.hue : axes.find((axis) => axis !== x);
  const metric = query.metric || e.hypotheses[0].metric;
  const metrics = [...new Set(e.arms.flatMap((arm) => arm.runs.flatMap((r) => Object.keys(r.results))))].filter((key) => key in e.measures);
  const pick = (name, value, of) => html`<label>${name} <select value=${value} onChange=${(event) => change({ [name]: event.target.value })}>
    ${of.map((one) => html`<option value=${one}>${one}</option>`)}</select></label>`;
  return html`<div class="eyebrow">sweep · <${Link} to=${"/experiment/" + id}>${id}<//></div><h1>${e.hypotheses[0].statement}</h1>
    <p><${Badge} kind=${e.verdict || e.status} /> ${e.reason}</p>
    <div class="bar">${pick("axis", x, axes)} ${axes.length > 1 && pick("hue", hue, axes.filter((axis) => axis !== x))}
      ${pick("metric", metric, metrics)}
      <button class=${query.log === "off" ? "" : "on"} onClick=${() => change({ log: query.log === "off" ? "" : "off" })}>log ${x}</button></div>
    <${Points} e=${e} x=${x} hue=${hue} metric=${metric} log=${query.log !== "off"} />
    <h2>Optima</h2><${Optima} e=${e} x=${x} hue=${hue} metric=${metric} />
    <h2>Conclusion</h2><pre>${JSON.stringify(e.conclusion, null, 2)}</pre>`;
}

// One line for each value of `hue`: the mean over seeds at each x.
function lines(e, x, hue, metric) {
  const by = new Map();
  for (const arm of e.arms) {
    const key = hue ? String(arm.point[hue]) : "";
    const values = arm.runs.map((r) => r.results[metric]).filter((v) => typeof v === "number");
    if (!by.has(key)) by.set(key, []);
    if (values.length) by.get(key).push({ x: arm.point[x], mean: values.reduce((a, b) => a + b, 0) / values.length, values, arm: arm.name });
  }
  const order = (a, b) => (isNaN(a[0]) || isNaN(b[0]) ? (a[0] < b[0] ? -1 : 1) : a[0] - b[0]);
  return [...by].sort(order).map(([key, points]) => [key, points.sort((a, b) => (a.x < b.x ? -1 : 1))]);
}

function Points({ e, x, hue, metric, log }) {
  const all = lines(e, x, hue, metric);
  const categories = [...new Set(all.flatMap(([, points]) => points.map((p) => p.x)))].sort((a, b) => (a < b ? -1 : 1));
  const numeric = categories.every((v) => typeof v === "number" && (!log || v > 0));
  const place = (v) => (numeric ? (log ? Math.log10(v) : v) : categories.indexOf(v));
  const grid = Float64Array.from(categories.map(place));
  const curves = all.map(([key, points], i) => ({
    y: categories.map((c) => points.find((p) => p.x === c)?.mean ?? null),
    label: hue ? `${hue} ${key}` : e.id, color: COLORS[i % COLORS.length], dash: [], width: 2, points: true,
  }));
  const seeds = all.flatMap(([key, points], i) => {
    const most = Math.max(...points.map((p) => p.values.length), 0);
    return Array.from({ length: most }, (_, s) => ({
      y: categories.map((c) => points.find((p) => p.x === c)?.values[s] ?? null), label: `${hue || ""} ${key}, a seed`,
      color: COLORS[i % COLORS.length], dash: [1, 5], alpha: 0.55, points: true,
    }));
  });
  const text = (v) => (numeric ? short(log ? 10 ** v : v, 3) : String(categories[Math.round(v)] ?? ""));
  return html`<${Lines} title=${`${label(metric)} over ${x}`} x=${grid} curves=${[...curves, ...seeds]} height=${360} xText=${text} splits=${() => [...grid]}
      range=${grid.length > 1 ? [grid[0] - 0.04 * (grid[grid.length - 1] - grid[0]), grid[grid.length - 1] + 0.04 * (grid[grid.length - 1] - grid[0])] : undefined} />
    ${hue && html`<${Legend} entries=${curves.map((c) => [c.label, c.color])} />`}`;
}

function Optima({ e, x, hue, metric }) {
  const of = e.measures[metric];
  const sign = of?.better === "higher" ? -1 : 1;
  const best = lines(e, x, hue, metric).filter(([, points]) => points.length)
    .map(([key, points]) => [key, points, points.reduce((a, b) => (sign * b.mean < sign * a.mean ? b : a))]);
  return html`<table><thead><tr><th>${hue || ""}</th><th class="num">best ${x}</th><th class="num">${metric}</th><th class="num">points</th>
      <th>at an edge</th></tr></thead><tbody>${best.map(([key, points, p]) => html`<tr><td>${key}</td>
      <td class="num">${typeof p.x === "number" ? short(p.x, 4) : p.x}</td><td class="num">${of ? measure(of, p.mean) : short(p.mean)}</td>
      <td class="num">${points.length}</td><td>${p === points[0] || p === points[points.length - 1] ? "yes: extend the grid" : "no"}</td></tr>`)}
    </tbody></table>`;
}
