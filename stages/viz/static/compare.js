// Two groups of runs, seed by seed: results, curves of the difference, configurations.
import { html } from "/static/preact-htm.js";
import { change, getJson, getSeries, hits, search, useLive } from "/static/api.js";
import { Lines, Panel } from "/static/charts.js";
import { COLORS, counted, grey, label, measure, noun, short } from "/static/format.js";
import { CurveBar, Failed, Legend, Link, Troubles, curveKeys, curveProps, seriesQuery, useKeys } from "/static/parts.js";

const TAGS = ["train/loss", "val/bpb", "grad_norm/all"];

export function Compare({ query }) {
  const [a, b] = ["a", "b"].map((side) => (query[side] || "").split(",").filter(Boolean));
  useKeys({ ...curveKeys(query), s: () => change({ a: query.b, b: query.a }) });
  if (!a.length || !b.length) {
    return html`<p class="empty">Select at least two <${Link} to="/">runs<//> with <kbd>x</kbd>, then <kbd>c</kbd>.</p>`;
  }
  return html`<${Pair} a=${a} b=${b} query=${query} />`;
}

function Pair({ a, b, query }) {
  const path = search({ a: a.join(","), b: b.join(",") });
  const state = useLive(path, () => getJson("/api/compare?" + path), hits([...a, ...b]));
  if (!state.data || state.error) return html`<${Failed} state=${state} />`;
  const { seeds, rows, curves, changes, measures } = state.data;
  const names = [nameOf(state.data.a), nameOf(state.data.b)];
  const subtracted = Object.entries(curves).filter(([, c]) => c);
  return html`<h1>${names[1]} against ${names[0]}</h1>
    <p class="soft">${seeds.length ? `Paired at ${noun(seeds.length, "seed")} ${seeds.join(", ")}.`
      : "No seed is on both sides: there are no pairs."}
      <button onClick=${() => change({ a: query.b, b: query.a })}>swap sides</button></p>
    <${Troubles} ids=${[...new Set([...a, ...b])]} />
    <h2>Results</h2><${Results} rows=${rows} measures=${measures} names=${names} />
    <h2>Difference by step, ${names[1]} − ${names[0]}</h2>
    ${subtracted.length === 0 ? html`<p class="soft">No curve was logged by both sides at a common step.</p>`
      : html`<p class="soft">Thick: mean over seeds, with its 95 % Student band. Thin: each seed. Below 0 is lower.</p>`}
    <div class="panels">${subtracted.map(([tag, c]) => html`<${Difference} key=${tag} tag=${tag} curve=${c} />`)}</div>
    <h2>Curves</h2><${CurveBar} query=${query} means=${true} />
    <${Curves} a=${state.data.a} b=${state.data.b} names=${names} query=${query} />
    <h2>Evaluation items that flipped</h2><${Flips} path=${path} ids=${[...a, ...b]} names=${names} />
    <h2>Configuration</h2><${Changes} changes=${changes} names=${names} />`;
}

// Answers that one side gets right and the other does not: counts, the paired difference, the items.
function Flips({ path, ids, names }) {
  const state = useLive("flips" + path, () => getJson("/api/flips?" + path), hits(ids));
  if (!state.data || state.error) return html`<${Failed} state=${state} />`;
  const f = state.data;
  if (f.missing) return html`<p class="soft" data-flips="0">None to compare: ${f.missing}.</p>`;
  const percent = (v) => `${v > 0 ? "+" : v < 0 ? "−" : ""}${Math.abs(100 * v).toFixed(1)}`;
  return html`<p class="soft">Suite ${f.suite} at step ${f.step}, ${counted(f.seeds, "seed")}. ± is a standard error, clustered by item
      and by seed; “told apart” by Holm's procedure over the tasks at 5 %.</p>
    <table data-flips=${f.tasks.length}><thead><tr><th>task</th><th class="num">items</th><th class="num">became right</th><th class="num">became wrong</th>
      <th class="num">accuracy, ${names[1]} − ${names[0]}, points</th><th>told apart</th></tr></thead><tbody>${f.tasks.map((t) => html`<tr>
      <td>${t.task}</td><td class="num">${t.documents}</td><td class="num">${t.gained}</td><td class="num">${t.lost}</td>
      <td class="num">${percent(t.mean)}<span class="soft"> ± ${(100 * t.error).toFixed(1)}</span></td>
      <td>${t.told_apart ? "yes" : html`<span class="soft">no</span>`}</td></tr>`)}</tbody></table>
    ${f.tasks.filter((t) => t.items.length).map((t) => html`<details><summary>${t.task}: the items that flipped in most seeds</summary>
      <table><thead><tr><th class="num">item</th><th class="num">right</th><th class="num">wrong</th><th>asked</th><th>right answer</th></tr></thead>
      <tbody>${t.items.map((i) => html`<tr><td class="num">${i.document}</td><td class="num">${i.gained}</td><td class="num">${i.lost}</td>
        <td class="wrap">${i.context || html`<span class="soft">its text is not in this root</span>`}</td><td class="wrap">${i.answer}</td></tr>`)}</tbody></table></details>`)}`;
}

const nameOf = (runs) => (runs.length > 1 ? runs[0].arm : `${runs[0].arm} · seed ${runs[0].seed}`);

export function Results({ rows, measures, names, metric }) {
  if (!rows.length) return html`<p class="soft">No result yet: it is recorded with a run's first evaluation and at its end.</p>`;
  const plus = (of, one) => html`${measure(of, one.mean)}
    ${one.n > 1 && one.high > one.mean ? html`<span class="soft"> ± ${measure(of, one.high - one.mean)}</span>` : ""}
    ${one.diverged ? html`<span class="soft"> (${one.n} of ${one.n + one.diverged})</span>` : ""}`;
  if (names.length === 1) {
    return html`<table data-results=${rows.length}><thead><tr><th></th><th class="num">${names[0]}</th></tr></thead><tbody>${rows.map((row) => html`
      <tr class=${row.key === metric ? "key" : ""}><td>${measures[row.key].label}</td><td class="num">${plus(measures[row.key], row.a)}</td></tr>`)}</tbody></table>`;
  }
  return html`<table data-results=${rows.length}><thead><tr><th></th><th class="num">${names[0]}</th><th class="num">${names[1]}</th>
      <th class="num">difference</th><th class="num">95 % interval</th><th>pairs</th></tr></thead>
    <tbody>${rows.map((row) => {
      const of = measures[row.key], d = row.difference;
      const known = d && d.low !== null && d.high !== null;
      return html`<tr class=${row.key === metric ? "key" : ""}><td>${of.label}</td><td class="num">${plus(of, row.a)}</td>
        <td class="num">${plus(of, row.b)}</td>
        <td class="num">${d?.n ? measure(of, d.mean_difference, true) : "—"}</td>
        <td class="num">${known ? `[${measure(of, d.low, true)}, ${measure(of, d.high, true)}]` : "—"}</td>
        <td>${known && html`<${Interval} of=${of} d=${d} />`}</td></tr>`;
    })}</tbody></table>`;
}

// Each pair as a dot, the interval as a bar, zero as a line.
function Interval({ of, d }) {
  const values = [0, d.low, d.high, ...d.differences];
  const low = Math.min(...values), span = Math.max(...values) - low;
  const at = (v) => (span ? 5 + (150 * (v - low)) / span : 80);
  const good = of.better === "lower" ? d.high < 0 : d.low > 0;
  const bad = of.better === "lower" ? d.low > 0 : d.high < 0;
  const tone = good ? "#009e73" : bad ? "#d55e00" : "currentColor";
  return html`<svg class="interval" width="160" height="16" role="img" aria-label="interval and pairs">
    <line x1=${at(0)} x2=${at(0)} y1="0" y2="16" stroke="currentColor" opacity="0.35" />
    <line x1=${at(d.low)} x2=${at(d.high)} y1="8" y2="8" stroke=${tone} stroke-width="3" opacity="0.5" />
    ${d.differences.map((v) => html`<circle cx=${at(v)} cy="8" r="2.2" fill=${tone} />`)}</svg><span class="soft">${good ? "better" : bad ? "worse" : ""}</span>`;
}

const signed = (v) => (v > 0 ? "+" : "") + short(v, 3);

function Difference({ tag, curve }) {
  const x = Float64Array.from(curve.steps);
  const thin = curve.seeds.map((y, i) => ({ y, label: `seed ${curve.of[i]}`, color: grey(), alpha: 0.7, dash: [] }));
  const band = curve.high ? [
    { y: curve.high, label: "95 % high", color: "transparent", dash: [], mute: true },
    { y: curve.low, label: "95 % low", color: "transparent", dash: [], mute: true },
  ] : [];
  const n = thin.length;
  const bands = curve.high ? [{ series: [n + 1, n + 2], fill: "rgba(0, 114, 178, 0.16)" }] : undefined;
  const mean = { y: curve.mean, label: "mean", color: COLORS[0], width: 2, dash: [] };
  return html`<${Lines} title=${label(tag)} x=${x} curves=${[...thin, ...band, mean]} bands=${bands} zero=${true}
    skip=${0.1} xKind="step" note=${`now ${signed(curve.mean[curve.mean.length - 1])} over ${counted(curve.of.length, "pair")}`} />`;
}

function Curves({ a, b, names, query }) {
  const runs = [...a, ...b], ids = [...new Set(runs.map((r) => r.id))];
  const asked = { run: ids, tag: TAGS, px: 600, ...seriesQuery(query) };
  const state = useLive(search(asked), () => getSeries(asked), hits(ids));
  if (!state.data || state.error) return html`<${Failed} state=${state} />`;
  const of = (id) => (a.some((r) => r.id === id) ? 0 : 1);
  const style = (curve) => ({
    label: `${names[of(curve.run)]} · seed ${runs.find((r) => r.id === curve.run)?.seed}`,
    color: [grey(), COLORS[0]][of(curve.run)], dash: [],
  });
  return html`<${Legend} entries=${[[names[0], grey()], [names[1], COLORS[0]]]} />
    <div class="panels" data-ready="yes">${state.data.map((panel) => html`
      <${Panel} key=${panel.tag} panel=${panel} style=${style} ...${curveProps(query)} />`)}</div>`;
}

// What an experiment's page shows of two arms below their results: what differs, and the difference by step.
export function Apart({ a, b, names, children }) {
  const path = search({ a: a.join(","), b: b.join(",") });
  const state = useLive(path, () => getJson("/api/compare?" + path), hits([...a, ...b]));
  const data = state.data, subtracted = Object.entries(data?.curves || {}).filter(([, c]) => c);
  return html`<div class="against"><div>${children}
      ${data && html`<h2>What differs between them</h2><${Changes} changes=${data.changes} names=${names} />`}</div>
    <div><${Failed} state=${state} />${data && html`<h2 class="first">${names[1]} − ${names[0]} by step</h2>
      ${subtracted.length === 0 ? html`<p class="soft">No curve was logged by both sides at a common step.</p>`
        : html`<p class="soft">Thick: mean over pairs of one seed, with its 95 % Student band from two pairs on. Thin: each pair.</p>`}
      <div class="panels">${subtracted.map(([tag, c]) => html`<${Difference} key=${tag} tag=${tag} curve=${c} />`)}</div>`}</div></div>`;
}

export function Changes({ changes, names }) {
  if (changes.error) return html`<p class="soft">${changes.error}</p>`;
  const rows = changes.rows.filter(([key]) => !key.startsWith("experiment."));
  if (!rows.length) return html`<p class="soft">The same in every key.</p>`;
  return html`<table><thead><tr><th>key</th><th>${names[0]}</th><th>${names[1]}</th><th>changes</th></tr></thead>
    <tbody>${rows.map(([key, x, y, kind]) => html`<tr><td class="mono">${key}</td><td class="mono wrap">${x}</td>
      <td class="mono wrap"><b>${y}</b></td><td class="soft">${kind}</td></tr>`)}</tbody></table>`;
}
