// The columns of every row that the table shows, coloured: a difference on two sides of none, an accuracy on one.
const HEATED = 200; // rows that are drawn

function heatColour(value, span) {
  if (value === null || !span) return "";
  const share = Math.round(78 * Math.min(1, Math.abs(value) / span));
  return `color-mix(in srgb, var(${value < 0 ? "--low" : "--high"}) ${share}%, var(--card))`;
}

function drawHeat() {
  const mode = byId("heat-mode").value;
  const columns = data.columns.filter((name) => name !== "Avg" && !data.rows.some((row) => row.cells[name]?.plain != null));
  const reference = (row) => (row.against.dense ? data.rows[row.against.dense.row] : null);
  const valueOf = (row, name) => {
    const cell = cellOf(row, name);
    if (!cell || mode === "accuracy") return cell && cell.accuracy;
    const other = reference(row) && cellOf(reference(row), name);
    return other ? cell.accuracy - other.accuracy : null;
  };
  const rows = visibleRows.filter((row) => columns.some((name) => valueOf(row, name) !== null)).slice(0, HEATED);
  const values = rows.map((row) => columns.map((name) => valueOf(row, name)));
  const known = values.flat().filter((value) => value !== null);
  const middle = mode === "accuracy" && known.length ? Math.min(...known) : 0;
  const span = Math.max(0, ...known.map((value) => Math.abs(value - middle)));
  const sizes = columns.map((name) => Math.max(0, ...rows.map((row) => cellOf(row, name)?.n ?? 0)));
  const head = make("tr", "", make("th", "name", "Row"), ...columns.map((name, i) => {
    const cell = make("th", "num", name);
    cell.append(make("small", "", sizes[i] ? `n ${sizes[i]}` : ""));
    return cell;
  }));
  const body = rows.map((row, i) => make("tr", row.kind, make("th", "name", row.name), ...values[i].map((value, j) => {
    const cell = make("td", "num", value === null ? "–" : mode === "accuracy" ? percent(value, 1) : signed(value, 1));
    const score = cellOf(row, columns[j]);
    cell.style.background = heatColour(value === null ? null : value - middle, span);
    if (score?.low != null) cell.title = `${percent(score.accuracy)} %, 95 % interval ${percent(score.low)} to ${percent(score.high)}`;
    return cell;
  })));
  byId("heat").replaceChildren(make("thead", "", head), make("tbody", "", ...body));
  byId("heat").parentElement.hidden = !rows.length;
  const left = visibleRows.length - rows.length;
  byId("heated").textContent = rows.length
    ? plural(rows.length, "row") + (left ? `; ${left} without ${mode === "accuracy" ? "these columns" : "a dense reference"}.` : ".")
    : mode === "accuracy" ? "No row has these columns." : "No row of the table has a dense reference; choose accuracy.";
}

function startHeat() {
  if (!data.rows.some((row) => row.kind === "run" && row.against.dense)) byId("heat-mode").value = "accuracy";
  byId("heat-mode").addEventListener("change", drawHeat);
}
