// A production run: how much of the wall time was training, what interrupted it, when it ends.
import { html } from "/static/preact-htm.js";
import { getJson, getSeries, hits, search, useLive } from "/static/api.js";
import { Panel } from "/static/charts.js";
import { at, color, noun, seconds, short, tone } from "/static/format.js";
import { Starts, marksOf } from "/static/run.js";
import { CurveBar, Facts, Failed, Legend, Link, Status, Troubles, curveKeys, curveProps, seriesQuery, useKeys } from "/static/parts.js";

const TAGS = ["train/tokens_per_s", "checkpoint/stall_s", "val/bpb", "train/loss", "grad_norm/all", "data/wait_s"];
const BUCKETS = { stepping: "#0072b2", "save stall": "#cc79a7", eval: "#009e73", "lost steps": "#d55e00", "hang wait": "#e69f00",
  starting: "#d3d7dc", compiling: "#8a6a3a", loading: "#56b4e9", queued: "#4e4167", stopped: "#45494e" };
const ON_DARK = { queued: "#7f3cdd", stopped: "#505962" };  // where the report's would sink into the page
const buckets = () => tone(BUCKETS, { ...BUCKETS, ...ON_DARK });

export function Production({ id, query, data }) {
  const state = useLive(id, () => getJson(`/api/prod/${id}`), hits([id]));
  const about = data.runs.find((r) => r.id === id);
  useKeys(curveKeys(query));
  if (!state.data || state.error) return html`<${Failed} state=${state} />`;
  const p = state.data;
  if (!p.attempts.length) return html`<p class="empty"><${Link} to=${"/run/" + id}>${id}<//> is no production run: <code>nmoe prod launch</code> starts one.</p>`;
  const share = p.total_tokens ? p.tokens / p.total_tokens : null;
  const percent = (v) => (v === null ? "—" : `${(100 * v).toFixed(1)} %`);
  return html`<h1>Production of <span class="mono">${id}</span></h1>
    <p><${Status} run=${{ ...p, age_s: about?.age_s }} />${p.state ? html`<span class="soft"> · ${p.state}</span>` : ""}</p>
    ${p.error && html`<p class="notice bad">${p.error}</p>`}<${Troubles} ids=${[id]} />
    <${Facts} pairs=${[["goodput", percent(p.goodput)], ["ETTR: without the queue", percent(p.ettr)], ["wall time", seconds(p.wall_s)],
      [noun(p.attempts.length, "attempt"), p.attempts.length], ["step", p.step.toLocaleString("en")], ["tokens", short(p.tokens)], ["of the plan", percent(share)],
      [`tokens per second ${p.status === "completed" ? "at the end" : "now"}`, short(p.tokens_per_s)], ["left, at the pace so far", p.status === "completed" ? "done" : seconds(p.left_s)]]} />
    <h2>Where the wall time went</h2><${Timeline} p=${p} /><${Spent} p=${p} />
    <div class="against"><div><h2>Attempts</h2><${Attempts} attempts=${p.attempts} />
        <h2>Evidence and checkpoints</h2><${Rests} p=${p} /></div>
      <div><h2>Events</h2><${Events} events=${p.events} /></div></div>
    <h2>Curves</h2><${Starts} starts=${p.starts} /><${CurveBar} query=${query} means=${true} /><${Curves} id=${id} query=${query} starts=${p.starts} />`;
}

// The spans of the wall time one after the other; what an evaluation or a save took is within stepping.
function Timeline({ p }) {
  const begun = p.spans[0]?.begin, there = new Set(p.spans.map((s) => s.bucket));
  return html`<svg class="timeline" width="100%" height="26" role="img" aria-label="the wall time, by what it was spent on"
    data-spans=${p.spans.length}>${p.spans.map((s) => html`<rect x=${`${(100 * (s.begin - begun)) / p.wall_s}%`} y="0" height="26"
      width=${`${(100 * (s.end - s.begin)) / p.wall_s}%`} data-tone=${s.bucket} fill=${buckets()[s.bucket]}><title>${s.bucket} for ${seconds(s.end - s.begin)},
      attempt ${s.attempt}, from ${at(s.begin)} UTC</title></rect>`)}</svg>
    <${Legend} entries=${Object.entries(buckets()).filter(([name]) => there.has(name))} />`;
}

function Spent({ p }) {
  const rows = Object.entries(p.seconds).filter(([, s]) => s > 0).sort((a, b) => b[1] - a[1]);
  return html`<table class="spent" data-buckets=${rows.length}><tbody>${rows.map(([name, s]) => html`<tr><td>${name}</td><td class="num">${seconds(s)}</td>
    <td class="num">${((100 * s) / p.wall_s).toFixed(1)} %</td><td class="wide"><svg width="100%" height="9"><rect width=${`${(100 * s) / rows[0][1]}%`}
      height="9" rx="2" data-tone=${name} fill=${buckets()[name]} /></svg></td></tr>`)}</tbody></table>`;
}

const Attempts = ({ attempts }) => html`<table data-attempts=${attempts.length}><thead><tr><th class="num">n</th><th>engine</th><th>job</th>
  <th class="num">hosts</th><th>began, UTC</th><th class="num">lasted</th><th class="num">checkpoints</th><th>outcome</th><th class="num">exit</th></tr></thead>
  <tbody>${attempts.map((a) => html`<tr><td class="num">${a.number}</td><td>${a.engine}</td><td>${a.job_id || "—"}</td><td class="num">${a.nodes.length}</td>
  <td>${at(a.started)}</td><td class="num">${a.ended ? seconds(a.ended - a.started) : "—"}</td><td class="num">${a.first_step}–${a.last_step}</td>
  <td>${a.outcome || "under way"}</td><td class="num">${a.outcome ? a.exit : ""}</td></tr>`)}</tbody></table>`;

// What an event tells, in words: numbers short, times as times, a rank of −1 (nobody) not at all.
const told = (detail) => Object.entries(detail).filter(([k, v]) => !(k === "suspect" && v < 0) && v !== "" && v !== null)
  .map(([k, v]) => `${["why", "reason"].includes(k) ? "" : k === "suspect" ? "suspect: rank" : k.replaceAll("_", " ")} ${/_at$/.test(k) && v > 1e9 ? at(v) : k === "startup" ? lasted(v) : value(v)}`).join(" · ");
// How long each part of a start took is in seconds.
const lasted = (parts) => Object.entries(parts).map(([k, s]) => `${k.replaceAll("_", " ")} ${seconds(s)}`).join(", ");
const value = (v) => (typeof v === "number" ? short(v, 4) : Array.isArray(v) ? v.map(value).join(", ") : typeof v !== "object" || v === null ? String(v)
  : Object.entries(v).map(([k, of]) => `${k.replaceAll("_", " ")} ${value(of)}`).join(", "));

function Events({ events }) {
  if (!events.length) return html`<p class="soft">None.</p>`;
  return html`<table><thead><tr><th>UTC</th><th>event</th><th class="num">attempt</th><th class="num">step</th><th>where</th><th>detail</th></tr></thead>
    <tbody>${events.map((e) => html`<tr><td>${at(e.time)}</td><td>${e.kind}</td><td class="num">${e.attempt}</td><td class="num">${e.step}</td>
    <td>${e.rank > 0 || ["straggler", "hardware"].includes(e.kind) ? `rank ${e.rank} ` : ""}${e.host}</td><td class="wrap soft">${told(e.detail)}</td></tr>`)}
    </tbody></table>`;
}

function Rests({ p }) {
  const evidence = p.evidence.length ? p.evidence.map((link, i) => html`${i ? ", " : ""}<${Link} to=${"/experiment/" + link.from_id}>${link.from_id}<//> ${link.relation}`) : "none: launched without";
  return html`<dl><dt>evidence</dt><dd>${evidence}</dd><dt>checkpoints kept</dt><dd>${p.checkpoints.length ? `steps ${p.checkpoints.join(", ")}` : "none"}</dd></dl>`;
}

function Curves({ id, query, starts }) {
  const asked = { run: id, tag: TAGS, px: 600, ...seriesQuery(query) };
  const state = useLive(search(asked), () => getSeries(asked), hits([id]));
  if (!state.data || state.error) return html`<${Failed} state=${state} />`;
  return html`<div class="panels" data-ready="yes">${state.data.filter((panel) => panel.x.length).map((panel) => html`
    <${Panel} key=${panel.tag} panel=${panel} style=${() => ({ label: panel.tag, color: color(0), dash: [], points: panel.x.length < 60 })}
      marks=${marksOf(starts, query)} ...${curveProps(query)} />`)}</div>`;
}
