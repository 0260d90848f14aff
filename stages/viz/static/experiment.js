// Experiments: the list, and one of them from its hypothesis to the evidence around it.
import { html } from "/static/preact-htm.js";
import { change, getJson, go, search, useLive } from "/static/api.js";
import { Apart, Results } from "/static/compare.js";
import { counted, measure, when } from "/static/format.js";
import { Badge, Failed, Link, Status, useKeys } from "/static/parts.js";

export function Experiments({ data, query }) {
  const all = data.experiments, at = Math.min(+(query.at || 0), Math.max(all.length - 1, 0));
  const move = (by) => change({ at: Math.min(Math.max(at + by, 0), all.length - 1) });
  useKeys({ j: () => move(1), k: () => move(-1), ArrowDown: () => move(1), ArrowUp: () => move(-1),
    Enter: () => all[at] && go(`/experiment/${all[at].id}`) });
  const count = (id) => data.runs.filter((r) => r.memberships.some(([e]) => e === id));
  return html`<table><thead><tr><th>experiment</th><th>stage</th><th>verdict</th><th>hypothesis</th><th class="num">runs</th>
      <th>updated</th></tr></thead><tbody>${all.map((e, i) => html`<tr key=${e.id} class=${i === at ? "at" : ""}>
      <td><${Link} to=${"/experiment/" + e.id}>${e.id}<//></td><td>${e.stage}</td>
      <td><${Badge} kind=${e.verdict || e.status} /></td><td class="wrap">${e.hypotheses[0]?.statement}</td>
      <td class="num">${count(e.id).length}</td><td class="soft">${when(e.updated)}</td></tr>`)}</tbody></table>
    ${all.length === 0 && html`<p class="empty">No experiments yet.</p>`}`;
}

export function Experiment({ id, data }) {
  const ids = data.runs.filter((r) => r.memberships.some(([e]) => e === id)).map((r) => r.id);
  const state = useLive(id, () => getJson(`/api/experiment/${id}`), (event) => event.records || event.runs.some((r) => ids.includes(r)));
  if (!state.data || state.error) return html`<${Failed} state=${state} />`;
  const e = state.data;
  const metric = e.hypotheses[0]?.metric, produced = data.runs.find((r) => r.production && ids.includes(r.id))?.id;
  return html`<div class="eyebrow">${e.stage} · ${e.id} · ${when(e.created)} UTC
      ${e.axes.length > 0 && html` · <${Link} to=${"/sweep/" + e.id}>sweep over ${e.axes.join(", ")}<//>`}
      ${produced && html` · <${Link} to=${"/prod/" + produced}>its production<//>`}</div>
    <h1>${e.hypotheses[0]?.statement}</h1>
    <p><${Badge} kind=${e.verdict || e.status} /> ${e.reason || `There is no conclusion yet${ended(e)}.`}</p>
    ${e.hypotheses.length > 1 && html`<h2>Hypotheses</h2><${Claims} e=${e} />`}
    <h2>Results</h2>${e.arms.length === 0 && html`<p class="soft">No run of it has begun.</p>`}${e.arms.length > MANY ? html`<${ByArm} e=${e} metric=${metric} />` : e.results.map((result) => (e.arms.length > 1
      ? html`<${Pair} key=${result.b} e=${e} result=${result} metric=${metric} />`
      : html`<${Results} rows=${result.rows} measures=${e.measures} metric=${metric} names=${[result.a]} />`))}
    ${e.arms.length > 0 && html`<h2>Runs</h2><${Members} e=${e} metric=${metric} live=${data.runs} />`}
    <h2>Evidence</h2><${Graph} graph=${e.graph} id=${e.id} />
    <h2>Report</h2>${e.report ? html`<p><a href=${"/report/" + e.id} target="_blank" rel="noopener">alone in a tab</a></p><iframe class="report" title="report" sandbox="allow-scripts" src=${"/report/" + e.id} />`
      : html`<p class="soft">None yet: <code>nmoe report ${e.id}</code> writes it.</p>`}`;
}

function ended(e) {
  const runs = e.arms.flatMap((arm) => arm.runs), over = runs.filter((r) => ["completed", "failed"].includes(r.status));
  return runs.length ? `: ${over.length} of ${counted(runs.length, "run")} ${over.length === 1 ? "has" : "have"} ended` : "";
}

// An arm against the first: which is ahead, whether it is noise, what differs.
const Pair = ({ e, result, metric }) => html`<${Apart} a=${idsOf(e.arms[0])} b=${idsOf(armOf(e, result.b))} names=${[result.a, result.b]}>
  <${Results} rows=${result.rows} measures=${e.measures} metric=${metric} names=${[result.a, result.b]} />
  <p class="after"><${Link} to=${comparison(e, result.b)}>curves of ${result.b} against ${result.a}<//></p><//>`;

// Many arms: a row each, and what most of them have of the measures.
function ByArm({ e, metric }) {
  const of = Object.fromEntries(e.results.map((r) => [r.b, r.rows]));
  const keys = [...new Set([metric, ...(e.results[0]?.rows || []).map((row) => row.key)])].filter((key) => e.measures[key]).slice(0, 6);
  const cell = (name, key) => {
    const first = name === e.arms[0].name, row = (first ? e.results[0]?.rows : of[name])?.find((one) => one.key === key);
    const one = row && (first ? row.a : row.b);
    return one ? html`${measure(e.measures[key], one.mean)}${one.n > 1 ? html`<span class="soft"> ± ${measure(e.measures[key], one.high - one.mean)}</span>` : ""}` : "—";
  };
  const known = e.arms.map((arm, i) => [arm.name, (i ? of[arm.name]?.find((r) => r.key === metric)?.b : e.results[0]?.rows.find((r) => r.key === metric)?.a)?.mean])
    .filter(([, mean]) => Number.isFinite(mean));
  const sign = e.measures[metric]?.better === "higher" ? -1 : 1, best = known.sort((x, y) => sign * (x[1] - y[1]))[0]?.[0];
  return html`<div class="scroll"><table data-arms=${e.arms.length}><thead><tr><th>arm</th>${keys.map((key) => html`<th class="num">${e.measures[key].label}</th>`)}
    <th></th></tr></thead><tbody>${e.arms.map((arm, i) => html`<tr class=${arm.name === best ? "key" : ""}><td>${arm.name}</td>${keys.map((key) => html`<td class="num">${cell(arm.name, key)}</td>`)}
    <td>${i > 0 && html`<${Link} to=${comparison(e, arm.name)}>against ${e.arms[0].name}<//>`}</td></tr>`)}</tbody></table></div>`;
}

const MANY = 4;  // arms beyond which a table for each would hide the rest
const comparison = (e, name) => "/compare?" + search({ a: idsOf(e.arms[0]).join(","), b: idsOf(armOf(e, name)).join(",") });
const armOf = (e, name) => e.arms.find((arm) => arm.name === name);
const idsOf = (arm) => arm.runs.map((r) => r.id);

const Claims = ({ e }) => html`<table><tbody>${e.hypotheses.map((h) => html`<tr><td class="wrap">${h.statement}</td>
  <td>${h.metric}</td><td>${h.direction}</td><td class="num">${h.min_effect}</td></tr>`)}</tbody></table>`;

function Members({ e, metric, live }) {
  const age = Object.fromEntries(live.map((r) => [r.id, r.age_s]));
  const of = e.measures[metric], failed = e.arms.some((arm) => arm.runs.some((r) => r.error));
  return html`<table><thead><tr><th>run</th><th>arm</th><th class="num">seed</th><th>status</th><th class="num">${of?.label || metric}</th>
      <th class="num">tok/s</th>${failed && html`<th>error</th>`}</tr></thead>
    <tbody>${e.arms.flatMap((arm) => arm.runs.map((r) => html`<tr key=${r.id + arm.name}>
      <td><${Link} to=${"/run/" + r.id} class="mono">${r.id}<//></td><td>${arm.name}</td><td class="num">${r.seed}</td>
      <td><${Status} run=${{ ...r, age_s: age[r.id] }} /></td><td class="num">${of ? measure(of, r.results[metric]) : "—"}</td>
      <td class="num">${measure(e.measures["train/tokens_per_s"], r.results["train/tokens_per_s"])}</td>
      ${failed && html`<td class="wrap soft">${r.error}</td>`}</tr>`))}</tbody></table>`;
}

const TONES = { supports: "#009e73", refutes: "#d55e00", refines: "#0072b2", repeats: "#7a7a7a", continues: "#cc79a7" };
const BOX = { width: 250, height: 46, gapX: 70, gapY: 16 };

// Columns by depth: what an experiment bears on stands to its right.
function columnsOf(graph) {
  const depth = Object.fromEntries(graph.nodes.map((n) => [n.id, 0]));
  for (let round = 0; round < graph.nodes.length; round++) {
    for (const link of graph.links) {
      if (link.from_id === link.to_id || depth[link.from_id] > graph.nodes.length) continue;
      depth[link.to_id] = Math.max(depth[link.to_id], depth[link.from_id] + 1);
    }
  }
  const levels = [...new Set(Object.values(depth))].sort((a, b) => a - b);
  return levels.map((level) => graph.nodes.filter((n) => depth[n.id] === level));
}

function Graph({ graph, id }) {
  if (!graph.links.length) return html`<p class="soft">No other experiment bears on this one, nor it on another.</p>`;
  const columns = columnsOf(graph);
  const place = {};
  columns.forEach((column, i) => column.forEach((node, j) => {
    place[node.id] = [i * (BOX.width + BOX.gapX), j * (BOX.height + BOX.gapY)];
  }));
  const width = columns.length * (BOX.width + BOX.gapX) - BOX.gapX;
  const height = Math.max(...columns.map((c) => c.length)) * (BOX.height + BOX.gapY)
    + (graph.links.some((l) => place[l.to_id][0] - place[l.from_id][0] > BOX.width + BOX.gapX) ? 60 : 0);
  const clip = (text, n) => (text.length > n ? text.slice(0, n - 1) + "…" : text);
  return html`<div class="scroll"><svg class="graph" width=${width + 2} height=${height} data-nodes=${graph.nodes.length}>
    ${graph.links.map((link) => {
      const [x1, y1] = place[link.from_id], [x2, y2] = place[link.to_id];
      const [a, b] = [y1 + BOX.height / 2, y2 + BOX.height / 2], tone = TONES[link.relation];
      const middle = (x1 + BOX.width + x2) / 2, far = x2 - x1 > BOX.width + BOX.gapX;
      const under = far ? Math.max(a, b) + BOX.height * 1.6 : 0;  // past the boxes between
      return html`<g><path d=${`M${x1 + BOX.width} ${a} C${far ? `${x1 + BOX.width + 60} ${under} ${x2 - 60} ${under}` : `${middle} ${a} ${middle} ${b}`} ${x2} ${b}`} fill="none"
          stroke=${tone} stroke-width="1.6" stroke-dasharray=${link.relation === "refutes" ? "5 3" : ""} />
        <path d=${`M${x2 - 7} ${b - 4} L${x2} ${b} L${x2 - 7} ${b + 4}`} fill="none" stroke=${tone} stroke-width="1.6" />
        <text class="soft" x=${middle} y=${far ? (a + b) / 8 + 0.75 * under - 5 : (a + b) / 2 - 5} text-anchor="middle">${link.relation}</text>
        <title>${link.note}</title></g>`;
    })}
    ${graph.nodes.map((node) => {
      const [x, y] = place[node.id];
      const open = (event) => { event.preventDefault(); go("/experiment/" + node.id); };
      return html`<a href=${"/experiment/" + node.id} onClick=${open}><g>
        <rect x=${x + 1} y=${y + 1} width=${BOX.width - 2} height=${BOX.height - 2} rx="6" fill="var(--tint)"
          stroke=${node.id === id ? "var(--ink)" : "var(--line)"} stroke-width=${node.id === id ? 1.6 : 1} />
        <text x=${x + 11} y=${y + 19}>${clip(node.id, 22)} · ${node.verdict || node.status}</text>
        <text class="soft" x=${x + 11} y=${y + 35}>${clip(node.hypotheses[0]?.statement || "", 34)}</text>
        <title>${node.hypotheses[0]?.statement}</title></g></a>`;
    })}</svg></div>`;
}
