// One run: its state, its curves in groups, its configuration, log and provenance.
import { html, useState } from "/static/preact-htm.js";
import { getJson, getSeries, hits, search, useLive } from "/static/api.js";
import { Lines, apart, smoothed } from "/static/charts.js";
import { at, color, counted, grey, measure, seconds, short, textOf, tone, when, whole } from "/static/format.js";
import { CurveBar, Facts, Failed, Legend, Link, Status, Troubles, curveKeys, curveProps,
  seriesQuery, useKeys } from "/static/parts.js";

export const PHASES = ["load", "forward", "backward", "graph", "clip", "step", "gather", "log", "eval", "checkpoint"];
const PHASE_COLORS = ["#d3d7dc", "#56b4e9", "#0072b2", "#0c5a44", "#e69f00", "#4e4167", "#bc6616", "#5a4c16",
  "#009e73", "#cc79a7"];
const ON_DARK = { graph: "#2e6b65", step: "#7f3cdd", log: "#ebe7ad" };  // where the report's would sink into the page

// The groups of a run's panels: title and tags, drawn on one axis each.
function groups(tags) {
  const of = (pattern) => tags.filter((tag) => pattern.test(tag));
  return [
    ["loss, nats per token", ["train/loss", "val/loss"]],
    ["bits per byte", ["train/bpb", "val/bpb"]],
    ["accuracy, with standard errors", of(/^eval\/[^/]+\/acc$/).slice(0, 7)],
    ["bits per byte of answers, with standard errors", of(/^eval\/[^/]+\/bpb$/).slice(0, 7)],
    ["gradient norm", of(/^grad_norm\//)],
    ["learning rate", of(/^lr\//)],
    ["tokens per second", ["train/tokens_per_s"]],
    ["model FLOPs utilisation, %", ["train/mfu"]],
    ["peak memory, GiB", ["memory/peak_bytes"]],
    ["times that memory was freed to find room", ["memory/retries"]],
    ["waiting for data", ["data/wait_s"]],
    ["rows received, and dispatched again", of(/^rdep\/rows/)],
    ["rounds of RDEP, most of a layer", ["rdep/rounds"]],
    ["RDEP capacity that one round needed", ["rdep/capacity_needed"]],
    ["forward passes that waited for counts, and those of them that ran full",
     ["rdep/waiting_passes", "rdep/full_passes"]],
    ["checkpoint stall", ["checkpoint/stall_s"]],
  ].map(([title, wanted]) => [title, wanted.filter((tag) => tags.includes(tag))])
    .filter(([, wanted]) => wanted.length);
}

export function Run({ id, query, data }) {
  const state = useLive(id, () => getJson(`/api/run/${id}`), hits([id]));
  useKeys(curveKeys(query));
  if (!state.data || state.error) return html`<${Failed} state=${state} />`;
  const run = { ...state.data, age_s: data.runs.find((r) => r.id === id)?.age_s };
  return html`<div class="eyebrow">${run.memberships.map(([e, arm]) => html`
      <${Link} to=${"/experiment/" + e}>${e}<//> · ${arm} · `)}seed ${run.seed} · ${run.target} · ${run.host} · started ${when(run.created)} UTC</div>
    <h1 class="mono">${id}</h1>
    <p><${Status} run=${run} /></p>
    ${run.error && html`<p class="notice bad">${run.error}</p>`}
    <${Troubles} ids=${[id]} />
    <${Facts} pairs=${Object.entries(run.measures).filter(([key]) => key in run.results)
      .map(([key, of]) => [of.label, measure(of, run.results[key])])} />
    <${CurveBar} query=${query} means=${true} />
    <${RunCurves} run=${run} query=${query} />
    <${Starts} starts=${run.starts} />
    <${Evaluations} run=${run} />
    <div class="two"><div><h2>Configuration</h2><${Leaves} leaves=${run.leaves} /></div>
      <div><h2>Provenance</h2><${Provenance} run=${run} />
        <h2>Log</h2>${run.log ? html`<pre>${run.log}</pre>` : html`<p class="soft">No log in this root.</p>`}</div></div>`;
}

// Where the run went on after its process ended, in the x of the page.
export const marksOf = (starts, query) => (starts || []).map((s) => ({ x: { tokens: s.tokens, step: s.step, time: s.time }[query.x || "tokens"] }));

export function Starts({ starts }) {
  if (!starts?.length) return null;
  const lost = starts.reduce((sum, s) => sum + s.rewound, 0);
  return html`<p class="soft" data-starts=${starts.length}>Dotted uprights: resumed ${starts.map((s) =>
    `at step ${s.step} (${at(s.when)}${s.rewound ? `, ${counted(s.rewound, "step")} back` : ""})`).join(", ")}.${lost ? ` ${counted(lost, "step")} ${lost === 1 ? "was" : "were"} trained again.` : ""}</p>`;
}

const named = (task, suite) => (task === suite ? `${task}: the suite's mean` : task);

// The newest value of every task, in the loop and by `nmoe eval`, with its standard error.
function Evaluations({ run }) {
  const tasks = run.tags.map((tag) => /^eval\/([^/]+)\/acc$/.exec(tag)?.[1]).filter(Boolean);
  const asked = { run: run.id, tag: tasks.flatMap((task) => ["acc", "acc_se", "bpb", "bpb_se"].map((m) => `eval/${task}/${m}`)), px: 40, x: "step" };
  const state = useLive(search(asked), () => (tasks.length ? getSeries(asked) : []), hits([run.id]));
  if (!tasks.length && !run.evaluations.length) return null;
  const last = Object.fromEntries((state.data || []).map((p) => [p.tag, p.curves[0]?.last]));
  const suite = run.leaves.find((leaf) => leaf.key === "eval.suite")?.value.replace(/^.*\/|\.toml$/g, "");
  const rows = tasks.map((task) => {
    const of = Object.fromEntries(["acc", "acc_se", "bpb", "bpb_se"].map((m) => [m, last[`eval/${task}/${m}`]?.[1]]));
    return [named(task, suite), "in the loop", last[`eval/${task}/acc`]?.[0], of];
  });
  for (const e of run.evaluations) {
    const by = {};
    for (const [tag, v] of Object.entries(e.results)) {
      const [, task, m] = tag.split("/");
      (by[task] ||= {})[m] = v;
    }
    rows.push(...Object.entries(by).map(([task, of]) => [named(task, e.suite), `nmoe eval, ${e.suite}, ${e.arithmetic}`, e.step, of]));
  }
  const plus = (of, m) => (of[m] === undefined ? "—" : html`${short(of[m], 4)}${of[m + "_se"] ? html`<span class="soft"> ± ${short(of[m + "_se"], 2)}</span>` : ""}`);
  return html`<h2>Evaluations</h2><table data-evaluations=${rows.length}><thead><tr><th>task</th><th class="num">step</th><th class="num">accuracy</th>
      <th class="num">bits per byte</th><th>measured</th></tr></thead><tbody>${rows.map(([task, by, step, of]) => html`<tr><td>${task}</td>
      <td class="num">${whole(step)}</td><td class="num">${plus(of, "acc")}</td><td class="num">${plus(of, "bpb")}</td><td class="soft">${by}</td></tr>`)}
    </tbody></table>`;
}

function RunCurves({ run, query }) {
  const drawn = groups(run.tags);
  const phases = PHASES.filter((phase) => run.tags.includes(`time/${phase}_s`));
  const errors = run.tags.filter((tag) => /^eval\/[^/]+\/(acc|bpb)_se$/.test(tag));
  const tags = [...drawn.flatMap(([, wanted]) => wanted), ...errors, ...phases.map((phase) => `time/${phase}_s`)];
  const asked = { run: run.id, tag: tags, px: 600, ...seriesQuery(query) };
  const state = useLive(search(asked), () => (tags.length ? getSeries(asked) : []), hits([run.id]));
  const panels = Object.fromEntries((state.data || []).map((panel) => [panel.tag, panel]));
  if (!tags.length) return null;
  return html`<div class="panels" data-ready=${state.data ? "yes" : "no"}>
    ${state.data && drawn.map(([title, wanted]) => html`<${Group} key=${title} title=${title}
      panels=${wanted.map((tag) => panels[tag]).filter(Boolean)} errors=${panels} starts=${run.starts} query=${query}
      planned=${/^peak/.test(title) && run.planned_bytes ? run.planned_bytes / 2 ** 30 : 0} />`)}
    ${state.data && phases.length > 0 && html`<${Phases} panels=${panels} phases=${phases} query=${query} />`}</div>`;
}

// Several tags on one axis; they are logged at different steps, so their x are joined.
function Group({ title, panels, errors, starts, planned, query }) {
  const x = Float64Array.from([...new Set(panels.flatMap((p) => [...p.x]))].sort((a, b) => a - b));
  const place = new Map([...x].map((v, i) => [v, i]));
  const share = curveProps(query).smooth;
  const curves = apart(panels.filter((p) => p.curves.length).map((p, i) => {
    const y = new Float32Array(x.length).fill(NaN);
    const of = share && p.x.length > 40 ? smoothed(p.curves[0].y, share) : p.curves[0].y;
    p.x.forEach((v, k) => { y[place.get(v)] = of[k]; });
    return { y, label: p.tag, color: color(i), dash: [], points: p.x.length < 40, width: i && p.x.length < 60 ? 2 : 1, last: p.curves[0].last?.[1] };
  }));
  if (planned) {
    curves.push({ y: new Float32Array(x.length).fill(planned), label: "plan", color: grey(), dash: [6, 3], points: false, last: planned });
  }
  const edges = [], bands = [];
  panels.filter((p) => p.curves.length).forEach((p, i) => {
    const se = errors[p.tag + "_se"]?.curves[0]?.y;
    if (!se) return;
    for (const sign of [1, -1]) {
      const y = new Float32Array(x.length).fill(NaN);
      p.x.forEach((v, k) => { y[place.get(v)] = p.curves[0].y[k] + sign * se[k]; });
      edges.push({ y, label: "", color: "transparent", dash: [], mute: true });
    }
    const n = curves.length + edges.length;
    bands.push({ series: [n - 1, n], fill: color(i) + "26" });
  });
  const yText = textOf(panels[0]?.tag || ""), last = curves.length === 1 ? yText(curves[0].last, 4) : "";
  const skip = /loss|bits|norm/.test(title) ? 0.05 : 0;
  return html`<div><${Lines} title=${title} x=${x} curves=${[...curves, ...edges]} bands=${bands.length ? bands : undefined}
      skip=${skip} note=${last} yText=${yText} whole=${/^rounds/.test(title)} marks=${marksOf(starts, query)} ...${curveProps(query)} />
    ${curves.length > 1 && html`<${Legend} entries=${curves.map((c) => [`${c.label}  ${short(c.last, 4)}`, c.color, c.dash])} />`}</div>`;
}

// Seconds of each phase between two log lines, stacked as shares of the whole.
function Phases({ panels, phases, query }) {
  const of = phases.map((phase) => panels[`time/${phase}_s`]).filter((p) => p?.curves.length);
  if (!of.length) return null;
  const { x } = of[0];
  const sum = new Float64Array(x.length);
  const rows = of.map((p) => Array.from(x, (v, i) => (p.x[i] === v ? p.curves[0].y[i] : p.curves[0].y[p.x.indexOf(v)]) || 0));
  rows.forEach((row) => row.forEach((v, i) => { sum[i] += v; }));
  const total = new Float64Array(x.length);
  const curves = rows.map((row, i) => {
    const name = of[i].tag.slice(5, -2), usual = PHASE_COLORS[PHASES.indexOf(name)], hue = tone(usual, ON_DARK[name] || usual);
    const y = row.map((v, k) => { total[k] += v; return sum[k] ? (100 * total[k]) / sum[k] : null; });
    return { y, label: name, color: hue, fill: hue, dash: [], width: 1 };
  });
  return html`<div><${Lines} title="time by phase, % of the whole" x=${x} curves=${curves.reverse()}
      ...${{ ...curveProps(query), log: false }} />
    <${Legend} entries=${curves.map((c) => [c.label, c.color]).reverse()} /></div>`;
}

export function Leaves({ leaves }) {
  const [all, setAll] = useState(false);
  const rows = all ? leaves : leaves.filter((leaf) => leaf.given);
  return html`<p class="soft">${all ? counted(leaves.length, "key") : `${rows.length} of ${counted(leaves.length, "key")}, those that differ from their default`}.
      <button onClick=${() => setAll(!all)}>${all ? "only given ones" : "all"}</button></p>
    <table><tbody>${rows.map((leaf) => html`<tr><td class="mono">${leaf.key}</td>
      <td class="mono wrap">${leaf.given ? html`<b>${leaf.value}</b>` : leaf.value}</td>
      <td class="soft">${leaf.kind}</td></tr>`)}</tbody></table>`;
}

function Provenance({ run }) {
  const pairs = [["commit", run.commit || "not a git checkout"], ["code version", run.code_version],
    ["fingerprint", run.fingerprint], ["data digest", run.data_digest], ["process", `${run.pid} on ${run.host}`],
    ["ranks that logged", run.ranks.join(", ") || "none"], ["updated", when(run.updated) + " UTC"],
    ["wall time", seconds(run.results.wall_s)],
    ...Object.entries(run.environment).map(([key, value]) => [key, typeof value === "string" ? value : JSON.stringify(value)])];
  return html`<dl>${pairs.map(([key, value]) => html`<dt>${key}</dt><dd class="mono">${value}</dd>`)}</dl>`;
}
