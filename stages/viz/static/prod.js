// A production run: how much of the wall time was training, what interrupted it, when it ends.
import { html } from "/static/preact-htm.js";
import { getJson, getSeries, hits, search, useLive } from "/static/api.js";
import { Panel } from "/static/charts.js";
import { at, seconds, short } from "/static/format.js";
import { Starts, marksOf } from "/static/run.js";
import { CurveBar, Facts, Failed, Status, curveKeys, curveProps, seriesQuery, useKeys } from "/static/parts.js";

const TAGS = ["train/tokens_per_s", "checkpoint/stall_s", "val/bpb", "train/loss", "grad_norm/all", "data/wait_s"];

export function Production({ id, query, data }) {
  const state = useLive(id, () => getJson(`/api/prod/${id}`), hits([id]));
  const about = data.runs.find((r) => r.id === id);
  useKeys(curveKeys(query));
  if (!state.data || state.error) return html`<${Failed} state=${state} />`;
  const p = state.data;
  if (!p.attempts.length) return html`<p class="empty">${p.trouble || "Nothing logged yet."}</p>`;
  const share = p.total_tokens ? p.tokens / p.total_tokens : null;
  return html`<h1>Production of <span class="mono">${id}</span></h1><p><${Status} run=${{ ...p, age_s: about?.age_s }} /></p>
    <${Facts} pairs=${[["goodput: stepping over wall time", p.goodput === null ? "—" : `${(100 * p.goodput).toFixed(1)} %`],
      ["wall time", seconds(p.wall_s)], ["starts", p.attempts.length], ["tokens", short(p.tokens)],
      ["of the plan", share === null ? "—" : `${(100 * share).toFixed(1)} %`], ["tokens per second now", short(p.tokens_per_s)],
      ["left, at that speed", p.status === "completed" ? "done" : seconds(p.eta_s)]]} />
    ${share !== null && html`<svg width="100%" height="10" role="img" aria-label="tokens done"><rect width="100%" height="10" rx="4" fill="var(--line)" />
      <rect width=${`${Math.min(100, 100 * share)}%`} height="10" rx="4" fill="#0072b2" /></svg>`}
    <div class="two"><div><h2>Stretches of log lines</h2><${Attempts} p=${p} /></div><div><h2>Where the time went</h2><${Spent} p=${p} /></div></div>
    ${p.recorded.length > 0 && html`<h2>Allocations</h2><${Recorded} recorded=${p.recorded} />`}
    ${p.events.length > 0 && html`<h2>Events</h2><${Events} events=${p.events} />`}
    <h2>Curves</h2><${Starts} starts=${p.starts} /><${CurveBar} query=${query} /><${Curves} id=${id} query=${query} starts=${p.starts} />`;
}

function Attempts({ p }) {
  return html`<table data-attempts=${p.attempts.length}><thead><tr><th class="num">n</th><th>first line</th><th>last line</th>
      <th class="num">steps</th><th class="num">logged for</th><th class="num">then lost</th></tr></thead>
    <tbody>${p.attempts.map((a, i) => html`<tr><td class="num">${i + 1}</td><td>${at(a.began)}</td><td>${at(a.ended)}</td>
      <td class="num">${a.first_step}–${a.last_step}</td><td class="num">${seconds(a.ended - a.began)}</td>
      <td class="num">${p.attempts[i + 1] ? seconds(p.attempts[i + 1].began - a.ended) : ""}</td></tr>`)}</tbody></table>
    ${p.error && html`<p class="notice bad">${p.error}</p>`}`;
}

function Spent({ p }) {
  const rows = Object.entries(p.spent).filter(([tag]) => tag.startsWith("time/") || tag.startsWith("startup/"))
    .map(([tag, s]) => [tag.replace(/_s$/, ""), s]).sort((a, b) => b[1] - a[1]);
  const known = rows.reduce((sum, [, s]) => sum + s, 0);
  if (p.wall_s > known) rows.push(["waiting, and work that was lost", p.wall_s - known]);
  const most = Math.max(...rows.map(([, s]) => s), 1e-9);
  return html`<table><tbody>${rows.map(([name, s]) => html`<tr><td>${name}</td><td class="num">${seconds(s)}</td>
    <td class="num">${p.wall_s ? `${((100 * s) / p.wall_s).toFixed(1)} %` : ""}</td><td style=${{ width: "45%" }}>
      <svg width="100%" height="9"><rect width=${`${(100 * s) / most}%`} height="9" rx="2" fill=${/time\/(eval|checkpoint)|startup|waiting/.test(name) ? "#e69f00" : "#0072b2"} /></svg></td></tr>`)}
    </tbody></table>`;
}

const Events = ({ events }) => html`<table><thead><tr><th>when</th><th>event</th><th class="num">attempt</th>
  <th class="num">step</th><th>where</th><th>detail</th></tr></thead><tbody>${events.map((e) => html`<tr><td>${at(e.time)}</td>
  <td>${e.kind}</td><td class="num">${e.attempt}</td><td class="num">${e.step}</td><td>${e.rank >= 0 ? `rank ${e.rank} ` : ""}${e.host}</td>
  <td class="wrap mono">${Object.entries(e.detail).map(([k, v]) => `${k} ${typeof v === "object" ? JSON.stringify(v) : v}`).join(", ")}</td></tr>`)}</tbody></table>`;

const Recorded = ({ recorded }) => html`<table data-recorded=${recorded.length}><thead><tr><th class="num">n</th><th>engine</th><th>job</th>
  <th>began</th><th>outcome</th><th class="num">checkpoints</th><th class="num">exit</th></tr></thead><tbody>${recorded.map((a) => html`<tr>
  <td class="num">${a.number}</td><td>${a.engine}</td><td>${a.job_id}</td><td>${at(a.started)}</td><td>${a.outcome || "under way"}</td>
  <td class="num">${a.first_step}–${a.last_step}</td><td class="num">${a.outcome ? a.exit : ""}</td></tr>`)}</tbody></table>`;

function Curves({ id, query, starts }) {
  const asked = { run: id, tag: TAGS, px: 600, ...seriesQuery(query) };
  const state = useLive(search(asked), () => getSeries(asked), hits([id]));
  if (!state.data || state.error) return html`<${Failed} state=${state} />`;
  return html`<div class="panels" data-ready="yes">${state.data.filter((panel) => panel.x.length).map((panel) => html`
    <${Panel} key=${panel.tag} panel=${panel} style=${() => ({ label: panel.tag, color: "#0072b2", dash: [], points: panel.x.length < 60 })}
      marks=${marksOf(starts, query)} ...${curveProps(query)} />`)}</div>`;
}
