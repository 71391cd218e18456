"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");

// Charts: drawn anew when the scheme changes, since their colours are their own.
async function draw() {
  for (const place of document.querySelectorAll("[data-chart]")) {
    const spec = structuredClone(data.charts[place.dataset.chart]);
    const ink = getComputedStyle(document.body).color;
    spec.config = {
      background: "transparent", view: { stroke: null }, title: { color: ink, anchor: "start", fontSize: 14 },
      axis: { labelColor: ink, titleColor: ink, gridOpacity: 0.35, labelFontSize: 12, titleFontSize: 12 },
      legend: { labelColor: ink, titleColor: ink, orient: "bottom", columns: 2 }, text: { color: ink }, rule: { color: ink },
      range: { category: dark.matches ? ["#8ab8f0", "#f0b48a", "#9fe0a8", "#d9a8f0"] : ["#0b57a4", "#a4550b", "#1d6b34", "#6b1d6b"] },
      mark: { color: dark.matches ? "#8ab8f0" : "#0b57a4" },
    };
    await vegaEmbed(place, spec, { actions: false, renderer: "svg", ast: true });
  }
  document.body.dataset.drawn = "true";
}

// The table: sorted and filtered in place, copied as it is shown.
const table = document.getElementById("accuracies");
const shown = () => [...table.tBodies[0].rows].filter((row) => !row.hidden);

function sort(button) {
  const heading = button.parentElement, up = heading.getAttribute("aria-sort") !== "ascending";
  for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", up ? "ascending" : "descending");
  const field = button.dataset.sort === "interval" ? "low" : button.dataset.sort;
  const value = (row) => data.rows[row.dataset.row][field];
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const [one, other] = [value(a), value(b)];
    if (one === null || other === null) return (one === null) - (other === null);
    const order = typeof one === "number" ? one - other : String(one).localeCompare(other, undefined, { numeric: true });
    return up ? order : -order;
  });
  table.tBodies[0].append(...rows);
}

function filter(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of table.tBodies[0].rows) {
    const content = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => content.includes(word));
  }
}

const cells = () => [table.tHead.rows[0], ...shown()].map((row) => [...row.cells].map((cell) => cell.textContent.trim()));
const formats = {
  csv: () => cells().map((row) => row.map((cell) => `"${cell.replaceAll('"', '""')}"`).join(",")).join("\n"),
  markdown: () => {
    const [head, ...rest] = cells().map((row) => `| ${row.map((cell) => cell.replaceAll("|", "\\|")).join(" | ")} |`);
    return [head, `|${" --- |".repeat(table.tHead.rows[0].cells.length)}`, ...rest].join("\n");
  },
  latex: () => {
    const escaped = (cell) => cell.replace(/[\\{}$&#^_~%]/g, (mark) => ({ "\\": "\\textbackslash{}", "^": "\\^{}", "~": "\\~{}" })[mark] ?? `\\${mark}`).replaceAll("±", "$\\pm$");
    const [head, ...rest] = cells().map((row) => `${row.map(escaped).join(" & ")} \\\\`);
    return ["\\begin{tabular}{llllllrrrr}", "\\toprule", head, "\\midrule", ...rest, "\\bottomrule", "\\end{tabular}"].join("\n");
  },
};

async function copy(kind) {
  const text = formats[kind](), status = document.getElementById("copied");
  try {
    await navigator.clipboard.writeText(text);
    status.textContent = `Copied as ${kind}.`;
  } catch {
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    status.textContent = document.execCommand("copy") ? `Copied as ${kind}.` : "The browser does not allow copying here.";
    area.remove();
  }
}

if (table) {
  table.addEventListener("click", (event) => event.target.dataset.sort && sort(event.target));
  document.getElementById("filter").addEventListener("input", (event) => filter(event.target.value));
  for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy(button.dataset.copy));
  const tell = (event) => { document.getElementById("told").textContent = event.target.closest("tr[data-row]")?.title ?? ""; };
  table.addEventListener("focusin", tell);
  table.addEventListener("mouseover", tell);
}

// A study that is watched: asked every few seconds how far it is; a new record brings a new page, where one was reading.
const EVERY = 3000;
async function watch() {
  const trouble = document.getElementById("trouble");
  try {
    const state = await (await fetch("/state", { cache: "no-store" })).json();
    if (state.version !== data.version) return location.reload();
    state.runs.forEach((run, index) => {
      const cells = document.getElementById("runs").rows[index].cells;
      cells[1].textContent = `${run.epochs} of ${run.epochs_in_all}`;
      cells[2].textContent = `${run.records} of ${run.records_in_all}`;
      cells[3].textContent = run.left;
    });
    trouble.textContent = state.trouble;
  } catch {
    trouble.textContent = "No answer: report --watch has ended, or is busy. This is what was last known.";
  }
  setTimeout(watch, EVERY);
}
if (data.version) setTimeout(watch, EVERY);
dark.addEventListener("change", draw);
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
draw();
})();
