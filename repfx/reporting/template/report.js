"use strict";
const root = document.documentElement;
const figures = JSON.parse(document.getElementById("figures").textContent);
const wanted = matchMedia("(prefers-color-scheme: dark)");
const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : wanted.matches);

function paint() {
  root.dataset.theme = dark() ? "dark" : "light";
  const text = getComputedStyle(root).getPropertyValue("--text").trim();
  for (const chart of document.querySelectorAll(".chart.drawn")) Plotly.relayout(chart, { "font.color": text });
}

function draw(chart) {
  const figure = figures[chart.id];
  const text = getComputedStyle(root).getPropertyValue("--text").trim();
  figure.layout.font = { color: text, family: "system-ui, sans-serif" };
  const options = { responsive: true, scrollZoom: chart.classList.contains("graph"), displaylogo: false, displayModeBar: false };
  Plotly.newPlot(chart, figure.data, figure.layout, options);
  chart.classList.add("drawn");
  if (chart.classList.contains("graph")) {
    chart.on("plotly_click", (event) => {
      const region = event.points[0].customdata;
      if (region >= 0) open(`region-${chart.dataset.model}-${region}`);
    });
  }
}

function open(id) {
  const region = document.getElementById(id);
  if (!region) return;
  region.open = true;
  region.scrollIntoView({ block: "center" });
  region.querySelector("summary").focus();
}

function key(cell) {
  const text = cell.dataset.sort ?? cell.textContent.trim().replaceAll(",", "");
  return text !== "" && !Number.isNaN(Number(text)) ? Number(text) : text;
}

function sort(header) {
  const row = header.parentElement;
  const body = row.closest("table").tBodies[0];
  const at = [...row.children].indexOf(header);
  const down = header.getAttribute("aria-sort") === "ascending";
  for (const other of row.children) other.setAttribute("aria-sort", "none");
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = [...body.rows].map((r) => [key(r.cells[at]), r]);
  rows.sort(([a], [b]) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b))));
  body.append(...(down ? rows.reverse() : rows).map(([, r]) => r));
}

document.getElementById("theme").addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; paint(); });
wanted.addEventListener("change", () => { delete root.dataset.theme; paint(); });
document.getElementById("save").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([document.getElementById("numbers").textContent], { type: "application/json" }));
  link.download = "report.json";
  link.click();
});
for (const button of document.querySelectorAll(".sortable th button")) {
  if (!button.classList.contains("open")) button.addEventListener("click", () => sort(button.parentElement));
}
for (const button of document.querySelectorAll(".open")) button.addEventListener("click", () => open(button.dataset.region));
for (const field of document.querySelectorAll(".filter")) {
  field.addEventListener("input", () => {
    const word = field.value.toLowerCase();
    for (const row of document.getElementById(field.dataset.table).tBodies[0].rows) row.hidden = !row.textContent.toLowerCase().includes(word);
  });
}
paint();
const near = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) { near.unobserve(entry.target); draw(entry.target); }
}, { rootMargin: "400px" });
for (const chart of document.querySelectorAll(".chart")) near.observe(chart);
