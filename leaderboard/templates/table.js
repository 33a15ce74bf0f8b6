// Sorting and filtering of the table, its columns, the theme, and the start of everything.
const heads = [...document.querySelectorAll("#table th[data-key]")];
const keys = heads.map((head) => head.dataset.key);
const numeric = heads.flatMap((head, i) => (head.classList.contains("num") ? [i] : []));
const scores = keys.findIndex((key) => key === "Avg" || key === "relative");
const ranks = keys.flatMap((key, i) => (key === "rank" || key.endsWith(" rank") ? [i] : []));
const DESCRIBED = ["model", "quantization", "pruner", "sensitivity", "fusion"];

const table = window.$("#table").DataTable({
  paging: false,
  titleRow: 1,
  autoWidth: false,
  layout: { topStart: null, topEnd: null, bottomStart: null, bottomEnd: null },
  order: scores < 0 ? [] : [[scores, "desc"]],
  columnDefs: [
    { targets: ranks, type: "num", searchable: false, orderSequence: ["asc", "desc"] },
    { targets: numeric.filter((i) => !ranks.includes(i)), type: "num", searchable: false, orderSequence: ["desc", "asc"] },
  ],
  language: { zeroRecords: data.details.length ? "No row fits these filters." : "No runs yet." },
});

// -- columns --

/** The column group of every leaf, from the first row of heads. */
const groups = [...document.querySelectorAll("#table tr.groups th")].flatMap((head) =>
  Array.from({ length: head.colSpan }, () => head.dataset.group ?? ""));
const chips = [...document.querySelectorAll("[data-columns]")];
const WIDE_ONLY = ["Compression", "Cost", "Subject", "Context", "Grade", "Strata", "Confidence", "Other", "Provenance"]; // what a phone leaves out at first

function press(chip, pressed) {
  chip.setAttribute("aria-pressed", String(pressed));
}

/** Show the groups that are pressed, without descriptions that are the same in every row: these stand above it. */
function showColumns() {
  const pressed = new Set(chips.filter((chip) => chip.getAttribute("aria-pressed") === "true").map((chip) => chip.dataset.columns));
  const rows = data.rows.filter((row) => row.kind === "run" || byId("paper").checked);
  const same = rows.length > 1
    ? DESCRIBED.filter((key) => rows.every((row) => row[key] === rows[0][key])) : [];
  byId("same").textContent = same.length && pressed.has("Compression")
    ? `In every row: ${same.map((key) => `${key} ${rows[0][key] || "–"}`).join(" · ")}` : "";
  keys.forEach((key, i) => {
    const wanted = (groups[i] === "" || pressed.has(groups[i])) && !same.includes(key);
    if (table.column(i).visible() !== wanted) table.column(i).visible(wanted, false);
  });
}

for (const chip of chips) {
  if (innerWidth < 640 && WIDE_ONLY.includes(chip.dataset.columns)) press(chip, false);
  chip.addEventListener("click", () => {
    press(chip, chip.getAttribute("aria-pressed") !== "true");
    showColumns();
  });
}

// -- rows --

const facets = [...document.querySelectorAll("select[data-facet]")];

const choices = new Map(facets.map((select) => [select, [...select.options]]));
const listed = (row) => row.kind === "run" || byId("paper").checked;
const chosen = (select, row) => select.value === "" || row[select.dataset.facet] === select.selectedOptions[0].dataset.value;
const fits = (row) => listed(row) && facets.every((select) => chosen(select, row));

/** Let each filter offer what the rows have that fit all other filters; one without a choice is hidden. */
function offer() {
  for (const select of facets) {
    const key = select.dataset.facet;
    const others = facets.filter((other) => other !== select);
    if (!data.rows.some((row) => listed(row) && chosen(select, row))) select.value = "";
    const values = new Set(data.rows.filter((row) => listed(row) && others.every((other) => chosen(other, row))).map((row) => row[key]));
    const kept = choices.get(select).filter((option) =>
      option.value === "" || option.value === select.value || values.has(option.dataset.value));
    if (kept.length !== select.options.length || kept.some((option, i) => option !== select.options[i])) {
      const value = select.value;
      select.replaceChildren(...kept);
      select.value = value;
    }
    select.parentElement.hidden = kept.length < 3 && select.value === "";
  }
}

function refresh() {
  offer();
  showColumns();
  table.search(byId("search").value).draw();
  visibleRows = table.rows({ search: "applied" }).nodes().toArray().map((node) => data.rows[node.dataset.row]);
  const own = visibleRows.filter((row) => row.kind === "run").length;
  const total = data.rows.filter((row) => row.kind === "run").length;
  byId("shown").textContent = `${own} of ${total} runs`
    + (visibleRows.length > own ? ` and ${visibleRows.length - own} rows of the paper.` : ".");
}

function changed() {
  refresh();
  drawFigures();
}

table.search.fixed("facets", (_text, _data, index) => fits(data.rows[table.row(index).node().dataset.row]));
byId("search").addEventListener("input", changed);
for (const control of [...facets, byId("paper")]) control.addEventListener("change", changed);
byId("detail").addEventListener("change", (event) => {
  byId("table").classList.toggle("compact", !event.target.checked);
});
byId("reset").addEventListener("click", () => {
  byId("search").value = "";
  for (const select of facets) select.value = "";
  byId("paper").checked = false;
  changed();
});

byId("table").tBodies[0].addEventListener("click", (event) => {
  const row = event.target.closest("tr[data-row]");
  if (row && getSelection().isCollapsed) openDetails(Number(row.dataset.row));
});

byId("theme").addEventListener("click", () => {
  const next = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  try {
    localStorage.setItem("qapbench-theme", next);
  } catch {
    // Not stored, so it holds until the page is left.
  }
  drawFigures();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawFigures);

// The files beside the page carry its name.
const base = location.pathname.split("/").at(-1).replace(/\.html?$/i, "");
for (const kind of ["csv", "json"]) byId(kind).href = `${base}.${kind}`;
byId("json").addEventListener("click", event => {
  if (location.protocol !== "file:") return;
  // A browser shows a JSON file of this machine in place of the page, so the page saves the same rows by itself.
  event.preventDefault();
  const rows = JSON.stringify(JSON.parse(byId("data").textContent).rows, null, 1);
  const link = Object.assign(document.createElement("a"), { download: `${base}.json` });
  link.href = URL.createObjectURL(new Blob([rows, "\n"], { type: "application/json" }));
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
});

startHeat();
startStudy();
refresh();
later(startPlotly, ...figures(), startCharts, startFlips);
