// The ranks of a run: which one is slow, in which phase, and what unequal loads cost.
import { html } from "/static/preact-htm.js";
import { getRanks, hits, search, useLive } from "/static/api.js";
import { HeatMap, rising } from "/static/charts.js";
import { seconds, short, whole, xText } from "/static/format.js";
import { PHASES } from "/static/run.js";
import { Choice, Facts, Failed, Link, Troubles, curveKeys, useKeys } from "/static/parts.js";

const percent = (share) => `${short(100 * share, 2)} %`;

export function Ranks({ id, query }) {
  const asked = { run: id, px: 300 };
  const state = useLive(search(asked), () => getRanks(asked), hits([id]));
  const { t } = curveKeys(query);
  useKeys({ t });
  if (!state.data || state.error) return html`<${Failed} state=${state} />`;
  const of = state.data, kind = query.x || "tokens", x = of.x?.[kind];
  if (of.ranks < 2) {
    return html`<h1>Ranks of <span class="mono">${id}</span></h1><${Troubles} ids=${[id]}><p class="empty">Its log has no phases
      of several ranks: it has one. Its phases are on the <${Link} to=${`/run/${id}`}>run page<//>.</p><//>`;
  }
  const at = (row) => (r, k) => row[r * of.n + k];
  const delay = at(of.delay), where = at(of.where), even = at(of.even);
  const rows = of.each.rows?.some((v) => v > 0);
  const map = { rows: of.ranks, columns: of.n, stops: rising(), cell: 20, rowLabel: (r) => `rank ${r}`, columnLabel: (k) => xText(kind, x[k], 3) };
  return html`<h1>Ranks of <span class="mono">${id}</span></h1>
    <${Troubles} ids=${[id]} />
    <div class="bar"><${Choice} name="x" value=${kind} of=${{ tokens: "tokens", step: "steps", time: "time" }} /></div>
    <${Summary} of=${of} />
    <${HeatMap} ...${map} title="how late a rank was in its slowest phase" scale=${["0", "≥ 20 % of the time between logs"]} value=${delay}
      shade=${(v) => v / 0.2}
      tip=${(r, k) => `rank ${r} at ${xText(kind, x[k])}: ${percent(delay(r, k))} above the median in ${of.names[where(r, k)]}`} />
    ${rows && html`<${HeatMap} ...${map} title="rows that a rank's experts received over the mean" scale=${["1", "≥ 1.5 × mean"]} value=${even}
      shade=${(v) => (v - 1) / 0.5} tip=${(r, k) => `rank ${r} at ${xText(kind, x[k])}: ${short(even(r, k), 3)} × mean`} />`}
    <div class="against"><div><h2>Slowest against median, by phase</h2><${Phases} of=${of} /></div>
      <div><h2>Every rank, means over the run</h2><${Every} of=${of} /></div></div>`;
}

function Summary({ of }) {
  const worst = of.phases[of.late], rows = of.each.rows || [], most = rows.indexOf(Math.max(...rows));
  const mean = rows.reduce((a, v) => a + v, 0) / (rows.length || 1);
  return html`<${Facts} pairs=${[["ranks", of.ranks], ["slowest rank", worst ? worst.rank : "—"], ["the phase in which it is slow", worst ? worst.name : "—"],
    ["above the median there", worst ? seconds(worst.above) : "—"], ["of the time between logs", worst ? percent(worst.share) : "—"],
    ["rows of the fullest rank over mean", mean > 0 ? `${short(rows[most] / mean, 3)}` : "—"], ["rounds now, most of a layer", of.rounds || "—"],
    ["balanced routing would give at most", of.gain === null ? "—" : `+${percent(of.gain)}`]]} />`;
}

const Phases = ({ of }) => html`<table data-late=${of.late}><thead><tr><th>phase</th><th class="num">slowest rank</th><th class="num">its mean</th>
  <th class="num">median</th><th class="num">difference</th><th class="num">of the time</th></tr></thead><tbody>${[...of.phases].sort((a, b) => inStep(a.name, b.name)).map((p) => html`
  <tr class=${p === of.phases[of.late] ? "key" : ""}><td>${p.name}</td><td class="num">${p.rank}</td><td class="num">${seconds(p.seconds)}</td>
  <td class="num">${seconds(p.median)}</td><td class="num">${seconds(p.above)}</td><td class="num">${percent(p.share)}</td></tr>`)}</tbody></table>`;

// As they follow each other in a step; the server has them by who waits for whom.
const inStep = (a, b) => PHASES.indexOf(a) - PHASES.indexOf(b);

const UNITS = { rows: "rows received", rounds: "rounds", wait_s: "waiting for data" };

function Every({ of }) {
  const phases = PHASES.map((name) => `${name}_s`).filter((name) => name in of.each);
  const names = [...phases, ...Object.keys(of.each).filter((name) => !phases.includes(name))];
  return html`<div class="scroll"><table><thead><tr><th>rank</th>${names.map((name) => html`<th class="num">${UNITS[name] || name.replace(/_s$/, "")}</th>`)}</tr></thead>
    <tbody>${Array.from({ length: of.ranks }, (_, r) => html`<tr><td>${r}</td>${names.map((name) => html`<td class="num">${
      /_s$/.test(name) ? seconds(of.each[name][r]) : name === "rows" ? whole(of.each[name][r]) : short(of.each[name][r], 3)}</td>`)}</tr>`)}</tbody></table></div>`;
}
