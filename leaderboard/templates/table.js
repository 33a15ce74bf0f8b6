// Sorting and filtering of the table, the theme, and the start of everything.
const heads = [...document.querySelectorAll("#table th")];
const numeric = heads.flatMap((head, i) => (head.classList.contains("num") ? [i] : []));
const scores = heads.findIndex((head) => head.textContent === "Avg");

const table = window.$("#table").DataTable({
  paging: false,
  autoWidth: false,
  layout: { topStart: null, topEnd: null, bottomStart: null, bottomEnd: null },
  order: scores < 0 ? [] : [[scores, "desc"]],
  columnDefs: [{ targets: numeric, type: "num", searchable: false, orderSequence: ["desc", "asc"] }],
  language: { zeroRecords: data.details.length ? "No row fits these filters." : "No runs yet." },
});

const facets = [...document.querySelectorAll("select[data-facet]")];

function fits(row) {
  if (row.kind === "paper" && !byId("paper").checked) return false;
  return facets.every((select) =>
    select.value === "" || row[select.dataset.facet] === select.selectedOptions[0].dataset.value);
}

function refresh() {
  table.search(byId("search").value).draw();
  visibleRows = table.rows({ search: "applied" }).nodes().toArray().map((node) => data.rows[node.dataset.row]);
  const own = visibleRows.filter((row) => row.kind === "run").length;
  const total = data.rows.filter((row) => row.kind === "run").length;
  byId("shown").textContent = `${own} of ${total} runs`
    + (visibleRows.length > own ? ` and ${visibleRows.length - own} rows of the paper.` : ".");
  drawChart();
}

table.search.fixed("facets", (_text, _data, index) => fits(data.rows[table.row(index).node().dataset.row]));
byId("search").addEventListener("input", refresh);
for (const control of [...facets, byId("paper")]) control.addEventListener("change", refresh);
byId("detail").addEventListener("change", (event) => {
  byId("table").classList.toggle("compact", !event.target.checked);
});
byId("reset").addEventListener("click", () => {
  byId("search").value = "";
  for (const select of facets) select.value = "";
  byId("paper").checked = false;
  refresh();
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
  drawChart();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawChart);

// The files beside the page carry its name.
const base = location.pathname.split("/").at(-1).replace(/\.html?$/i, "");
for (const kind of ["csv", "json"]) byId(kind).href = `${base}.${kind}`;

refresh();
requestAnimationFrame(() => setTimeout(startChart));
