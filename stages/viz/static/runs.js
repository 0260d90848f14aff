// All runs: a table to filter and select from, and the curves of what is selected.
import { html, useEffect, useMemo, useRef, useState } from "/static/preact-htm.js";
import { change, getJson, getSeries, go, hits, listed, search, useLive, watch } from "/static/api.js";
import { Panel, Spark } from "/static/charts.js";
import { Chooser, byPrefix, differing } from "/static/choose.js";
import { byName, color, counted, dash, measure, textOf, when } from "/static/format.js";
import { Badge, CurveBar, Legend, Link, Status, Troubles, armColors, armDashes, curveKeys, curveProps, seriesQuery,
  useKeys } from "/static/parts.js";

const COLUMNS = ["val/bpb", "train/loss", "train/tokens_per_s", "train/mfu"];
const HEADS = { "val/bpb": "val bpb", "train/loss": "loss", "train/tokens_per_s": "tok/s",
  "train/mfu": "MFU %" };
const ABOUT = { created: "when it was recorded, UTC", updated: "last change of its record, UTC", host: "machine", target: "processor" };
const LIVE = ["running", "starting", "restarting"];
const MANY = 300; // rows drawn before "show all"
const READ = 100; // runs whose tags are looked up, of those shown

const known = (v) => v !== undefined && v !== null;

// What a column holds of a run: a result, a leaf of its configuration, the last value of a tag, or about it.
function cellsOf(data, logged) {
  const maps = [];
  const leaf = (i, key) => (key.includes(".") ? (maps[i] ||= new Map(data.configs[i])).get(key) : undefined);
  return (r, key) => r.results[key] ?? leaf(r.config, key) ?? logged[key]?.[r.id] ?? r[key];
}

// A word with = looks at the leaves of the configuration (and seed, status, target), as key=value, all of
// the value; one with <, >, <= or >= at numbers, of results and columns too; one without at names: run,
// experiment, arm, status, host.
const BOUND = /^(.+?)(<=|>=|<|>)([-+.\de]+)$/i;
const WITHIN = { "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b };

function wordsOf(text) {
  try {
    return text.split(/\s+/).filter(Boolean).map((word) => {
      const [, key, sign, number] = BOUND.exec(word) || [];
      if (key && number !== "" && Number.isFinite(+number)) return { key, within: (v) => typeof v === "number" && WITHIN[sign](v, +number) };
      return word.includes("=") ? { leaf: new RegExp(`(${word})$`, "im") } : { name: new RegExp(word, "im") };
    });
  } catch {
    return null;
  }
}

function matching(data, text, cell, columns) {
  if (!text) return data.runs;
  const words = wordsOf(text);
  if (!words) return [];
  const configs = data.configs.map((leaves) => leaves.map(([k, v]) => `${k}=${v}`).join("\n"));
  return data.runs.filter((r) => {
    const names = [r.id, ...r.memberships.flat(), r.status, r.host].join("\n");
    const leaves = `train.seed=${r.seed}\nstatus=${r.status}\ntarget=${r.target}\n${configs[r.config]}`;
    const keys = () => ["seed", ...columns, ...Object.keys(r.results), ...data.configs[r.config].map(([k]) => k)];
    const within = ({ key, within: fits }) => keys().some((k) => (k === key || k.endsWith("." + key) || k.endsWith("/" + key)) && fits(cell(r, k)));
    return words.every((word) => (word.key ? within(word) : word.leaf ? word.leaf.test(leaves) : word.name.test(names)));
  });
}

function sorted(runs, by, cell) {
  if (!by) return runs;
  const down = by.startsWith("-"), key = down ? by.slice(1) : by;
  const order = (x, y) => (typeof x === "number" && typeof y === "number" ? x - y : byName(String(x), String(y)));
  return runs.map((r) => [r, cell(r, key)]).sort(([, x], [, y]) => (known(x) && known(y) ? order(x, y) * (down ? -1 : 1) : known(y) - known(x)))
    .map(([r]) => r);
}

// Tag -> run -> its last value, of every run that `lacks` it: read after the page stands, some runs at a
// time, and again when there is more.
function useLogged(runs, tags, lacks) {
  const [values, setValues] = useState({});
  const [changes, setChanges] = useState(0);
  const asked = useRef(new Set());
  useEffect(() => watch((event) => {
    const more = event.runs.flatMap((id) => tags.filter((tag) => asked.current.delete(`${tag} ${id}`)));
    if (more.length) setChanges((n) => n + 1);
  }), [tags.join()]);
  useEffect(() => {
    let gone = false;
    const ask = async (tag) => {
      for (;;) {
        const next = runs.filter((r) => lacks(r, tag) && !asked.current.has(`${tag} ${r.id}`)).slice(0, 50).map((r) => r.id);
        if (gone || !next.length) return;
        next.forEach((id) => asked.current.add(`${tag} ${id}`));
        const [panel] = await getSeries({ run: next, tag, px: 1 }, true);
        const last = Object.fromEntries(panel.curves.map((curve) => [curve.run, curve.last?.[1]]));
        setValues((old) => ({ ...old, [tag]: { ...old[tag], ...last } }));
      }
    };
    tags.forEach((tag) => ask(tag).catch(() => {}));
    return () => { gone = true; };
  }, [tags.join(), runs, changes]);
  return values;
}

// The tags that the runs logged, while someone looks.
function useTags(runs, looking) {
  const ids = looking ? runs.slice(0, READ).map((r) => r.id) : [];
  const state = useLive("tags" + ids.join(), () => (ids.length ? getJson("/api/tags?" + search({ run: ids })) : { tags: [] }), hits(ids));
  return state.data?.tags || [];
}

export function Runs({ query, data }) {
  const columns = query.cols ? listed(query.cols) : COLUMNS;
  const results = useMemo(() => new Set([...Object.keys(data.measures), ...data.runs.flatMap((r) => Object.keys(r.results))]), [data]);
  const logged = useLogged(data.runs, columns.filter((key) => key.includes("/")),
    (r, tag) => !results.has(tag) || (!(tag in r.results) && LIVE.includes(r.status)));
  const cell = useMemo(() => cellsOf(data, logged), [data, logged]);
  const shown = useMemo(() => sorted(matching(data, query.f, cell, columns), query.sort, cell), [data, query.f, query.sort, query.cols, cell]);
  const chosen = query.sel === undefined ? shown.slice(0, 10).map((r) => r.id)
    : query.sel.split(",").filter((id) => data.runs.some((r) => r.id === id));
  const at = Math.min(+(query.at || 0), Math.max(shown.length - 1, 0));
  const filter = useRef();
  const toggle = (id) => change({
    sel: (chosen.includes(id) ? chosen.filter((other) => other !== id) : [...chosen, id]).join(",") || "none",
  });
  const move = (by) => change({ at: Math.min(Math.max(at + by, 0), shown.length - 1) });
  useEffect(() => document.querySelector("tr.at")?.scrollIntoView({ block: "nearest" }), [at]);
  useKeys({
    ...curveKeys(query),
    "/": () => filter.current.focus(),
    j: () => move(1), ArrowDown: () => move(1), k: () => move(-1), ArrowUp: () => move(-1),
    x: () => shown[at] && toggle(shown[at].id),
    a: () => change({ sel: shown.slice(0, 50).map((r) => r.id).join(",") }),
    n: () => change({ sel: "none" }),
    c: () => go(comparison(data, chosen)),
    Enter: () => shown[at] && go(`/run/${shown[at].id}`),
  });
  const runs = data.runs.filter((r) => chosen.includes(r.id));
  return html`<div class="runs"><div class="side">
    <div class="bar">
      <input ref=${filter} class="filter" type="search" placeholder="words, key=value, key<1, regex  ( / )"
        aria-label="filter runs" value=${query.f || ""} onInput=${(e) => change({ f: e.target.value, at: "" })} />
      ${query.f && !wordsOf(query.f) && html`<span class="warn">not a pattern yet</span>`}
      <span class="soft">${shown.length} of ${counted(data.runs.length, "run")}, ${runs.length} selected</span>
      <button onClick=${() => go(comparison(data, chosen))} disabled=${runs.length < 2}>compare</button>
      <button onClick=${() => change({ sel: "none" })}>none</button>
      <${Columns} ...${{ data, shown, columns, results }} />
    </div>
    <${Table} ...${{ data, shown, chosen, toggle, at, query, columns, cell }} />
  </div><${Curves} ...${{ runs, query, panels: data.panels }} /></div>`;
}

// The selected runs as two groups: by arm where there are two, else the first against the others.
export function comparison(data, chosen) {
  const runs = data.runs.filter((r) => chosen.includes(r.id)).reverse();
  const arms = [...new Set(runs.map((r) => r.arm))];
  const first = arms.includes("baseline") ? "baseline" : arms[0];
  const a = arms.length > 1 ? runs.filter((r) => r.arm === first) : runs.slice(0, 1);
  const b = arms.length > 1 ? runs.filter((r) => r.arm === arms.find((arm) => arm !== first)) : runs.slice(1);
  return "/compare?" + search({ a: a.map((r) => r.id).join(","), b: b.map((r) => r.id).join(",") });
}

// Which columns the table has: what differs in the configurations, results, and last values of what was logged.
function Columns({ data, shown, columns, results }) {
  const [looking, look] = useState(false);
  const tags = useTags(shown, looking);
  const groups = useMemo(() => (looking ? [
    [`configuration that differs among ${counted(shown.length, "run")} shown`, differing(shown, (r) => data.configs[r.config])],
    ["results", [...results].filter((key) => shown.some((r) => key in r.results)).map((key) => [key, data.measures[key]?.label])],
    ["about the run", Object.entries(ABOUT)],
    ...byPrefix(tags.filter((tag) => !results.has(tag))).map(([prefix, of]) => [`${prefix}/, last value logged`, of]),
  ] : []), [looking, shown, tags]);
  return html`<${Chooser} label="columns" letter="o" groups=${groups} chosen=${columns} ...${{ looking, look }}
    choose=${(keys) => change({ cols: keys.join(",") })} />`;
}

// A cell as its kind is written; a leaf's value is a button that filters by it.
function written(data, column, value, query) {
  if (data.measures[column]) return measure(data.measures[column], value);
  if (!known(value)) return "—";
  if (column === "created" || column === "updated") return when(value);
  if (column.includes("/")) return textOf(column)(value, 4);
  if (!column.includes(".")) return value;
  const word = `${column}=${String(value).replace(/[*+?^${}()|[\]\\]/g, "\\$&").replace(/\s/g, ".")}`;
  const words = (query.f || "").split(/\s+/).filter(Boolean);
  const next = words.includes(word) ? words.filter((one) => one !== word) : [...words, word];
  return html`<button class="plain" tabindex="-1" title=${`only ${column}=${value}`} onClick=${() => change({ f: next.join(" "), at: "" })}>${String(value)}</button>`;
}

function Table({ data, shown, chosen, toggle, at, query, columns, cell }) {
  const [all, setAll] = useState(false);
  const rows = all ? shown : shown.slice(0, MANY);
  const selected = data.runs.filter((r) => chosen.includes(r.id));
  const colors = runColors(selected, query), dashes = runDashes(selected, query);
  const sparks = useSparks(rows);
  const sort = (key) => change({ sort: query.sort === key ? "-" + key : query.sort === "-" + key ? "" : key });
  const numeric = Object.fromEntries(columns.map((key) => [key, rows.every((r) => typeof (cell(r, key) ?? 0) === "number") ? "num" : ""]));
  const head = (key, text, kind = "") => html`<th class="sort ${kind}" tabindex="0" title=${key}
    aria-sort=${query.sort === key ? "ascending" : query.sort === "-" + key ? "descending" : "none"}
    onClick=${() => sort(key)} onKeyDown=${(event) => event.key === "Enter" && sort(key)}>
    ${text}${query.sort === key ? " ↑" : query.sort === "-" + key ? " ↓" : ""}</th>`;
  return html`<div class="list scroll"><table><thead><tr><th></th>${head("id", "run")}
    ${head("experiment", "experiment")}${head("arm", "arm")}${head("seed", "seed", "num")}
    ${head("status", "status")}${columns.map((key) => head(key, HEADS[key] || (key.includes("/") ? key : key.split(".").pop()), numeric[key]))}<th>loss curve</th></tr></thead>
    <tbody>${rows.map((r, i) => html`<tr key=${r.id} class=${i === at ? "at" : ""}>
      <td><button class="swatch" aria-label=${"select " + r.id} aria-pressed=${chosen.includes(r.id)}
        style=${{ background: hatched(colors[r.id], dashes[r.id]), borderColor: colors[r.id] || "" }}
        onClick=${() => toggle(r.id)} /></td>
      <td><${Link} to=${"/run/" + r.id} class="mono" title=${when(r.created)}>${r.id}<//></td>
      <td><${Link} to=${"/experiment/" + r.experiment}>${r.experiment}<//></td>
      <td>${r.arm}</td><td class="num">${r.seed}</td><td><${Status} run=${r} /></td>
      ${columns.map((key) => html`<td class=${numeric[key]}>${written(data, key, cell(r, key), query)}</td>`)}
      <td><${Spark} y=${sparks[r.id]} color=${colors[r.id]} dash=${dashes[r.id]} /></td></tr>`)}</tbody></table>
    ${rows.length < shown.length && html`<p class="empty"><button onClick=${() => setAll(true)}>
      show all ${shown.length}</button></p>`}
    ${data.runs.length === 0 && html`<p class="empty">No runs yet: <code>nmoe ablate BASE VARIANT</code> makes some.</p>`}
  </div>`;
}

export function runColors(runs, query) {
  const arms = armColors(runs);
  const pairs = runs.map((r, i) => [r.id, query.by === "run" ? color(i) : arms[`${r.experiment}/${r.arm}`]]);
  return Object.fromEntries(pairs);
}

function runDashes(runs, query) {
  const arms = armDashes(runs);
  return Object.fromEntries(runs.map((r, i) => [r.id, query.by === "run" ? dash(i) : arms[`${r.experiment}/${r.arm}`] || []]));
}

// A swatch of a dashed curve has stripes.
const hatched = (tone, dashes) => (!tone ? "" : dashes?.length ? `repeating-linear-gradient(135deg, ${tone} 0 3px, transparent 3px 6px)` : tone);

// The loss of every row in a few points; asked for after the page stands, some runs at a time, and again
// when there is more of it.
function useSparks(rows) {
  const [sparks, setSparks] = useState({});
  const [changes, setChanges] = useState(0);
  const asked = useRef(new Set());
  useEffect(() => watch((event) => {
    const more = event.runs.filter((id) => asked.current.delete(id));
    if (more.length) setChanges((n) => n + 1);
  }), []);
  useEffect(() => {
    let gone = false;
    const ask = async () => {
      for (;;) {
        const next = rows.filter((r) => !asked.current.has(r.id)).slice(0, 25).map((r) => r.id);
        if (gone || !next.length) return;
        next.forEach((id) => asked.current.add(id));
        const panels = await getSeries({ run: next, tag: "train/loss", px: 40, apart: 1 });
        const found = panels.map((panel, i) => [next[i], panel.curves[0]?.y]);
        setSparks((old) => ({ ...old, ...Object.fromEntries(found) }));
      }
    };
    const timer = setTimeout(() => ask().catch(() => {}), 400);
    return () => { gone = true; clearTimeout(timer); };
  }, [rows.map((r) => r.id).join(), changes]);
  return sparks;
}

function Curves({ runs, query, panels }) {
  const tags = query.tags ? listed(query.tags) : panels;
  const [looking, look] = useState(false);
  const every = useTags(runs, looking);
  const groups = useMemo(() => byPrefix(every), [every]);
  const ids = runs.map((r) => r.id);
  const asked = { run: ids, tag: tags, px: 600, ...seriesQuery(query) };
  const state = useLive(search(asked), () => (ids.length ? getSeries(asked) : []), hits(ids));
  const colors = runColors(runs, query), dashes = runDashes(runs, query);
  const byId = Object.fromEntries(runs.map((r) => [r.id, r]));
  const style = (curve) => {
    const r = byId[curve.run];
    return r ? { label: `${r.arm} · seed ${r.seed}`, color: colors[r.id], dash: dashes[r.id] } : { label: curve.run };
  };
  if (!ids.length) return html`<p class="empty">Select runs with <kbd>x</kbd> or a click to see their curves.</p>`;
  return html`<div><${CurveBar} query=${query} means=${true}>
      <button class=${query.by === "run" ? "on" : ""}
        onClick=${() => change({ by: query.by === "run" ? "" : "run" })}>colour by run</button>
      <${Chooser} label="panels" letter="p" groups=${groups} chosen=${tags} ...${{ looking, look }}
        choose=${(keys) => change({ tags: keys.join(",") })} /><//>
    ${query.by !== "run" && html`<${Legend} entries=${legend(armColors(runs), armDashes(runs))} />`}
    <${Troubles} ids=${ids} />
    ${state.error && html`<p class="notice bad">${state.error}</p>`}
    <div class="panels" data-ready=${state.data ? "yes" : "no"}>${(state.data || []).map((panel) => html`
      <${Panel} key=${panel.tag} panel=${panel} style=${style}
        ...${curveProps(query)} />`)}</div></div>`;
}

// An entry an arm; the baselines, all grey, have one together.
function legend(arms, dashes) {
  const others = Object.entries(arms).filter(([arm]) => !arm.endsWith("/baseline")).map(([arm, tone]) => [arm, tone, dashes[arm]]);
  const base = Object.entries(arms).find(([arm]) => arm.endsWith("/baseline"));
  return base ? [["baseline", base[1]], ...others] : others;
}

