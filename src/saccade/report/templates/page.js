"use strict";
// The theme: the address may end in #dark or #light; else the system's; the button switches.
const root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");
const wanted = location.hash.slice(1);
if (["dark", "light"].includes(wanted)) root.dataset.theme = wanted;
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);

// A theme colour as plotly can read it: the browser resolves light-dark().
const probe = document.body.appendChild(document.createElement("i"));
probe.hidden = true;
const ink = name => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color; };
const inked = text => text.replace(/\$(bg|fg|muted|grid|band)\b/g, (_, name) => ink(name));

const UNFOLD = { share: code => code, mass: code => (code - 250) / 50 };
const hidden = new Set();
const groups = [...document.querySelectorAll(".plots")].map(box => ({
  box,
  choosers: [...box.querySelectorAll(".choosers select")],
  plots: [...box.querySelectorAll("figure")].map(f => ({
    node: f.querySelector(".plot"),
    variants: JSON.parse(f.querySelector("script").textContent),
  })),
}));

function draw(group) {
  const key = group.choosers.map(c => c.value).join("|");
  for (const { node, variants } of group.plots) {
    const figure = JSON.parse(inked(JSON.stringify(variants[key])));
    for (const trace of figure.data) trace.visible = !hidden.has(trace.meta);
    for (const trace of figure.data) if (trace.meta in UNFOLD) unfold(trace, UNFOLD[trace.meta]);
    fit(figure.layout, node);
    Plotly.react(node, figure.data, figure.layout, { responsive: true, displaylogo: false, displayModeBar: false });
  }
  const table = group.box.querySelector(".drawn");
  if (table) write(table, group.plots[0].variants[key].data[0]);
}

// A map comes as one byte a cell, 255 where there are no pairs; what is drawn of a mass is its logarithm.
function unfold(trace, meaning) {
  const codes = Uint8Array.from(atob(trace.z.bdata), c => c.charCodeAt(0));
  const wide = Number(trace.z.shape.split(",")[1]);
  const rows = Array.from({ length: codes.length / wide }, (_, i) => [...codes.subarray(i * wide, (i + 1) * wide)]);
  trace.z = rows.map(row => row.map(c => (c === 255 ? null : meaning(c))));
  trace.customdata = trace.z.map(row => row.map(z => (z > -5 ? 100 * 10 ** z : 0)));
}

// On a logarithmic axis plotly wants the exponent of an annotation's place.
function fit(layout, node) {
  if (layout.xaxis.type === "log") for (const a of layout.annotations ?? []) a.x = Math.log10(a.x);
  if (node.clientWidth < 500) Object.assign(layout.margin, { l: 48, r: 8 });
  Object.assign(layout.xaxis, { fixedrange: node.clientWidth < 500 });
  Object.assign(layout.yaxis, { fixedrange: node.clientWidth < 500 });
  layout.font.family = getComputedStyle(document.body).fontFamily;
  layout.hoverlabel = { bgcolor: ink("card"), bordercolor: ink("muted"), font: { color: ink("fg"), size: 13 } };
}

// The numbers of the heat map, written out only when they are asked for.
function write(box, trace) {
  const details = box.closest("details");
  const fill = () => {
    if (!details.open) return;
    const table = document.createElement("table");
    const percents = Uint8Array.from(atob(trace.z.bdata), c => c.charCodeAt(0));
    trace.y.forEach((name, i) => {
      const row = table.insertRow();
      row.innerHTML = `<th scope="row">${name}</th>`;
      const wide = percents.length / trace.y.length;
      for (const p of percents.subarray(i * wide, (i + 1) * wide)) row.insertCell().textContent = `${p} %`;
    });
    box.replaceChildren(table);
  };
  details.ontoggle = fill;
  fill();
}

const drawAll = () => groups.forEach(draw);
for (const group of groups) for (const c of group.choosers) c.onchange = () => draw(group);
dark.onchange = drawAll;
document.getElementById("theme").onclick = () => { root.dataset.theme = isDark() ? "light" : "dark"; drawAll(); };
for (const button of document.querySelectorAll(".legend button")) {
  button.onclick = () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", shown);
    hidden[shown ? "delete" : "add"](button.dataset.label);
    drawAll();
  };
}
let before;
addEventListener("beforeprint", () => { before = root.dataset.theme; root.dataset.theme = "light"; drawAll(); });
addEventListener("afterprint", () => {
  if (before) root.dataset.theme = before;
  else delete root.dataset.theme;
  drawAll();
});

// Sorting: numbers by value, words by alphabet, empty cells last; a second press turns it round.
const isNumber = text => text !== "" && !Number.isNaN(Number(text));
function order(a, b, up) {
  if (a === "" || b === "") return (a === "") - (b === "");
  return (up ? 1 : -1) * (isNumber(a) && isNumber(b) ? a - b : a.localeCompare(b));
}
for (const th of document.querySelectorAll(".sortable thead tr:last-child th")) {
  th.firstElementChild.onclick = () => {
    const up = th.ariaSort !== "ascending";
    for (const other of th.parentElement.children) other.removeAttribute("aria-sort");
    th.ariaSort = up ? "ascending" : "descending";
    const body = th.closest("table").tBodies[0];
    const value = row => row.children[th.cellIndex].dataset.value;
    const rows = [...body.rows].sort((a, b) => order(value(a), value(b), up));
    body.append(...rows);
  };
}
drawAll();
