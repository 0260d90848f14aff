// The ranks of a run: which one is slow, in which phase, and what unequal loads cost.
import { html } from "/static/preact-htm.js";
import { getJson, getSeries, hits, search, useLive } from "/static/api.js";
import { HeatMap, around, rising } from "/static/charts.js";
import { seconds, short, xText } from "/static/format.js";
import { CurveBar, Facts, Failed, curveKeys, seriesQuery, useKeys } from "/static/parts.js";

const APART = ["time/eval_s", "time/checkpoint_s"];

export function Ranks({ id, query }) {
  const about = useLive(id, () => getJson(`/api/run/${id}`), (event) => event.records);
  useKeys(curveKeys(query));
  if (!about.data || about.error) return html`<${Failed} state=${about} />`;
  const { ranks, tags, expert_share: share } = about.data;
  if (!ranks.length) return html`<p class="empty">No rank has logged yet.</p>`;
  return html`<${RankMap} ...${{ id, query, ranks, tags, share }} />`;
}

function RankMap({ id, query, ranks, tags, share }) {
  const phases = tags.filter((tag) => /^time\/.*_s$/.test(tag) && !APART.includes(tag));
  const others = ["rdep/rows", "rdep/rounds", "data/wait_s"].filter((tag) => tags.includes(tag));
  const asked = { run: id, rank: ranks, tag: [...phases, ...others], px: 400, ...seriesQuery(query) };
  const state = useLive(search(asked), () => getSeries(asked), hits([id]));
  if (!state.data || state.error) return html`<${Failed} state=${state} />`;
  const panels = Object.fromEntries(state.data.map((p) => [p.tag, p]));
  const first = panels[phases[0]];
  if (!first?.x.length) return html`<p class="empty">No phase was timed.</p>`;
  const of = (tag, rank) => panels[tag]?.curves.find((c) => c.rank === rank)?.y;
  const x = first.x, kind = query.x || "tokens";
  // A rank waits for the others in the collectives of backward and step: work is load and forward.
  const total = ranks.map((rank) => Float64Array.from(x, (_, k) => phases.reduce((sum, tag) => sum + (of(tag, rank)?.[k] || 0), 0)));
  const middle = Float64Array.from(x, (_, k) => median(total.map((row) => row[k])));
  const at = (r, k) => total[r][k] / middle[k];
  return html`<h1>Ranks of <span class="mono">${id}</span></h1><${CurveBar} query=${query} />
    <${Summary} ...${{ ranks, phases, panels, of, share, x }} />
    <${HeatMap} title="time between two log lines over the median of ranks" scale=${["0.8", "1.2 × median, slower"]}
      rows=${ranks.length} columns=${x.length} value=${at} stops=${around()} cell=${20}
      shade=${(v) => 0.5 + (v - 1) / 0.4} rowLabel=${(r) => `rank ${ranks[r]}`} columnLabel=${(k) => xText(kind, x[k], 2)}
      tip=${(r, k) => `rank ${ranks[r]} at ${xText(kind, x[k])}: ${seconds(total[r][k])}, ${short(at(r, k), 3)} × median`} />
    ${panels["rdep/rows"]?.x.length > 0 && html`<${Rows} panel=${panels["rdep/rows"]} ranks=${ranks} kind=${kind} />`}
    <h2>Slowest against median, by phase</h2><${Table} ...${{ ranks, phases, of }} />
    <h2>Every rank</h2><${Every} ...${{ ranks, tags: [...phases, ...others], of }} />`;
}

function median(values) {
  const sorted = [...values].filter((v) => !Number.isNaN(v)).sort((a, b) => a - b);
  const n = sorted.length;
  return n ? (sorted[Math.floor((n - 1) / 2)] + sorted[Math.ceil((n - 1) / 2)]) / 2 : NaN;
}

const mean = (y) => {
  const known = [...(y || [])].filter((v) => !Number.isNaN(v));
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : NaN;
};

function phaseRows(ranks, phases, of) {
  return phases.map((tag) => {
    const times = ranks.map((rank) => mean(of(tag, rank)));
    const slowest = times.indexOf(Math.max(...times));
    return { tag, rank: ranks[slowest], slow: times[slowest], mid: median(times) };
  });
}

function Summary({ ranks, phases, panels, of, share }) {
  const worst = phaseRows(ranks, phases, of).sort((a, b) => b.slow - b.mid - (a.slow - a.mid))[0];
  const rows = ranks.map((rank) => mean(of("rdep/rows", rank)));
  const most = Math.max(...rows), even = mean(rows);
  const known = ranks.length > 1 && Number.isFinite(most);
  const busy = known && share ? share * (1 - even / most) : NaN;
  const rounds = Math.max(...(panels["rdep/rounds"]?.curves || []).map((c) => c.last?.[1] ?? 0), 0);
  return html`<${Facts} pairs=${[["ranks", ranks.length], ["phase with the longest wait", worst ? worst.tag.slice(5, -2) : "—"],
    ["slowest rank there", worst ? worst.rank : "—"], ["its time above the median", worst ? seconds(worst.slow - worst.mid) : "—"],
    ["rows of the fullest rank over mean", known ? short(most / even, 3) : "—"], ["rounds now, most of a layer", rounds || "—"],
    ["balanced routing would give at most", Number.isFinite(busy) ? `+${short((100 * busy) / (1 - busy), 2)} %` : "—"]]} />`;
}

function Table({ ranks, phases, of }) {
  return html`<table><thead><tr><th>phase</th><th class="num">slowest rank</th><th class="num">its mean</th><th class="num">median</th>
      <th class="num">difference</th></tr></thead><tbody>${phaseRows(ranks, phases, of).map((row) => html`<tr>
      <td>${row.tag.slice(5, -2)}</td><td class="num">${row.rank}</td><td class="num">${seconds(row.slow)}</td>
      <td class="num">${seconds(row.mid)}</td><td class="num">${seconds(row.slow - row.mid)}</td></tr>`)}</tbody></table>`;
}

function Every({ ranks, tags, of }) {
  return html`<div class="scroll"><table><thead><tr><th>rank</th>${tags.map((tag) => html`<th class="num">${tag}</th>`)}</tr></thead>
    <tbody>${ranks.map((rank) => html`<tr><td>${rank}</td>${tags.map((tag) => html`<td class="num">${short(mean(of(tag, rank)), 4)}</td>`)}</tr>`)}
    </tbody></table></div>`;
}

function Rows({ panel, ranks, kind }) {
  const { x } = panel;
  const of = ranks.map((rank) => panel.curves.find((c) => c.rank === rank)?.y);
  const even = Float64Array.from(x, (_, k) => mean(of.map((y) => y?.[k] ?? NaN)));
  const at = (r, k) => (of[r] ? of[r][k] / even[k] : NaN);
  return html`<${HeatMap} title="rows that a rank's experts received over the mean" rows=${ranks.length} columns=${x.length}
    value=${at} scale=${["1", "1.5 × mean"]} shade=${(v) => (v - 1) / 0.5} stops=${rising()} cell=${20} rowLabel=${(r) => `rank ${ranks[r]}`}
    columnLabel=${(k) => xText(kind, x[k], 2)} tip=${(r, k) => `rank ${ranks[r]} at ${xText(kind, x[k])}: ${short(of[r]?.[k])} rows`} />`;
}
