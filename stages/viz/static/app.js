// The frame of every page: header, notices, keys, and which page the address names.
import { html, render, useEffect, useRef, useState } from "/static/preact-htm.js";
import { getJson, go, redraw, useAddress, useLive, watch } from "/static/api.js";
import { paint } from "/static/format.js";
import { Link, useKeys } from "/static/parts.js";
import { Compare } from "/static/compare.js";
import { Experiment, Experiments } from "/static/experiment.js";
import { Production } from "/static/prod.js";
import { Ranks } from "/static/ranks.js";
import { Router } from "/static/router.js";
import { Run } from "/static/run.js";
import { Runs } from "/static/runs.js";
import { Sweep } from "/static/sweep.js";

const PAGES = [
  [/^\/$/, Runs, "runs"],
  [/^\/run\/([^/]+)$/, Run, "run"],
  [/^\/run\/([^/]+)\/router$/, Router, "router"],
  [/^\/run\/([^/]+)\/ranks$/, Ranks, "ranks"],
  [/^\/compare$/, Compare, "compare"],
  [/^\/experiments$/, Experiments, "experiments"],
  [/^\/experiment\/([^/]+)$/, Experiment, "experiment"],
  [/^\/sweep\/([^/]+)$/, Sweep, "sweep"],
  [/^\/prod\/([^/]+)$/, Production, "production"],
];
const OF_RUN = { run: (id) => `/run/${id}`, router: (id) => `/run/${id}/router`, ranks: (id) => `/run/${id}/ranks`,
  production: (id) => `/prod/${id}` };
const KEYS = [["/", "filter"], ["j k", "next, previous row"], ["x", "select the row"], ["a n", "select all, none"],
  ["o p", "choose columns, panels"], ["c", "compare what is selected"], ["Enter", "open the row"], ["t", "tokens, steps, time"], ["l", "log scale"],
  ["m", "means over 1 %, 5 % of what is shown"],
  ["s", "swap the sides of a comparison"], ["z", "whole range"], ["drag", "zoom"], ["double-click", "whole range"], ["d", "dark or light"], ["g h", "runs"],
  ["g e", "experiments"], ["?", "this"]];

const wanted = localStorage.getItem("theme");
const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
document.documentElement.dataset.theme = wanted || system;
paint(wanted || system);

function flip() {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  localStorage.setItem("theme", next);
  paint(next);
  redraw();
}

// What is cut off in a table or a legend is told by its title.
addEventListener("mouseover", ({ target }) => {
  const cell = target.closest?.("td, th, .legend span");
  if (cell && cell.scrollWidth > cell.clientWidth) cell.title = cell.innerText;
});

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;  // no escape: as it was typed
  }
}

function App() {
  const [path, query] = useAddress();
  const [lost, setLost] = useState(false);
  const help = useRef(), leader = useRef(0);
  const state = useLive("runs", () => getJson("/api/runs"), (event) => event.records);
  useEffect(() => watch((event) => setLost(Boolean(event.lost))), []);
  const after = (f) => () => Date.now() - leader.current < 900 && f();
  useKeys({
    "?": () => (help.current.open ? help.current.close() : help.current.showModal()),
    d: flip,
    g: () => { leader.current = Date.now(); },
    h: after(() => go("/")),
    e: after(() => go("/experiments")),
  });
  const [pattern, Page, name] = PAGES.find(([p]) => p.test(path)) || [/./, null, ""];
  const id = decoded(pattern.exec(path)?.[1] || "");
  useEffect(() => { document.title = ["nmoe", name, id].filter(Boolean).join(" · "); }, [path]);
  const data = state.data;
  const produced = name === "production" || data?.runs.find((r) => r.id === id)?.production;
  return html`<header>
      <${Link} to="/" class="mark">nmoe<//>
      <nav><${Link} to="/" class=${name === "runs" ? "here" : ""}>runs<//>
        <${Link} to="/experiments" class=${/^exp/.test(name) ? "here" : ""}>experiments<//>
        ${name in OF_RUN && Object.entries(OF_RUN).filter(([page]) => page !== "production" || produced).map(([page, to]) => html`
          <${Link} to=${to(id)} class=${page === name ? "here" : ""}>${page}<//>`)}
        ${["compare", "sweep"].includes(name) && html`<a class="here">${name}</a>`}</nav>
      <span class="where mono">${data?.root}</span>
      <span class="right">${lost ? "no connection" : html`<i class="dot running" />live`}
        <button onClick=${flip} title="dark or light (d)">◐</button>
        <button onClick=${() => help.current.showModal()} title="keys (?)">?</button></span>
    </header>
    ${data?.notice && html`<div class="notice">${data.notice}</div>`}
    ${state.error && html`<div class="notice bad">${state.error}</div>`}
    <main data-page=${name}>${!data ? html`<p class="empty">reading the records…</p>`
      : Page ? html`<${Page} key=${name + id} id=${id} query=${query} data=${data} />`
      : html`<p class="empty">No such page. <${Link} to="/">All runs<//></p>`}</main>
    <dialog ref=${help} onClick=${() => help.current.close()}><h2>Keys</h2><dl>${KEYS.map(([key, text]) => html`
      <dt>${key.split(" ").map((k) => html`<kbd>${k}</kbd> `)}</dt><dd>${text}</dd>`)}</dl></dialog>`;
}

render(html`<${App} />`, document.getElementById("app"));
