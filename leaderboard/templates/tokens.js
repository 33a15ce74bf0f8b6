// Accuracy against tokens or another cost, of the rows that the table shows: frontier, and unpruned rows as lines.
const TICKS = Array.from({ length: 15 }, (_, i) => 2 ** i);
const DODGE = 0.045; // octaves between neighbouring methods, so that bars at one budget do not hide each other
const FADED = 0.35; // opacity of rows that another beats at no more cost
const LINES = 4; // unpruned rows that are drawn across

/** What a row costs on the axis that is chosen; null if it is not known. */
const costOf = (row) => (byId("axis").value === "tokens" ? position(row) : row.costs[byId("axis").value] ?? null);

/** The cost on the axis in words, unless it is the number of tokens, which is told anyway. */
function costWords(row) {
  const chosen = byId("axis");
  if (chosen.value === "tokens" || costOf(row) === null) return [];
  return [chartText(`${chosen.selectedOptions[0].text} ${Number(costOf(row).toPrecision(4))}`)];
}

/** Where rows of several methods have one budget, how far each stands aside, in octaves; elsewhere nothing. */
function sideways(rows, methods) {
  const at = new Map();
  for (const method of methods) {
    for (const row of rows.filter((candidate) => methodOf(candidate) === method)) {
      at.set(costOf(row), (at.get(costOf(row)) ?? new Set()).add(method));
    }
  }
  return (row) => {
    const sharing = [...(at.get(costOf(row)) ?? [])];
    const step = DODGE * Math.min(1, 10 / sharing.length);
    return step * (sharing.indexOf(methodOf(row)) - (sharing.length - 1) / 2);
  };
}

/** One trace. A gap parts runs that differ in more than their budget, so a line joins only what is comparable. */
function trace(name, rows, column, aside, extra) {
  const lineOf = (row) => JSON.stringify([row.model, row.quantization, row.pruner, row.fusion]);
  const sorted = rows.map((row) => [lineOf(row), row])
    .sort(([a, x], [b, y]) => (a === b ? costOf(x) - costOf(y) : a < b ? -1 : 1));
  const points = sorted.flatMap(([line, row], i) => (i && sorted[i - 1][0] !== line ? [null, row] : [row]));
  const cells = points.map((row) => row && row.cells[column]);
  return {
    name: chartText(name, 44),
    x: points.map((row) => row && costOf(row) * 2 ** aside(row)),
    y: cells.map((cell) => cell && 100 * cell.accuracy),
    error_y: whiskers(cells),
    hovertext: points.map((row, i) => (row ? hover(row, cells[i], column) : "")),
    customdata: points.map((row) => row && data.rows.indexOf(row)),
    hoverinfo: "text",
    type: "scatter",
    ...extra,
  };
}

/** Rows that no other has the accuracy of with as few tokens; of equal ones the first. */
function frontier(rows, column) {
  const sorted = rows.toSorted((a, b) =>
    costOf(a) - costOf(b) || b.cells[column].accuracy - a.cells[column].accuracy);
  let best = -1;
  return sorted.filter((row) => {
    const better = row.cells[column].accuracy > best;
    if (better) best = row.cells[column].accuracy;
    return better;
  });
}

function frontierTrace(rows, column) {
  const points = frontier(rows, column);
  const heights = points.map((row) => 100 * row.cells[column].accuracy);
  return {
    name: "Pareto frontier",
    x: [...points.map(costOf), Math.max(...rows.map(costOf))],
    y: [...heights, heights.at(-1)],
    line: { shape: "hv", width: 5, color: "#8a6fd155" },
    mode: "lines", type: "scatter", hoverinfo: "skip",
    meta: points.map((row) => data.rows.indexOf(row)),
  };
}

/** Unpruned rows across the whole width: full precision dashed, quantized dash-dotted. */
function acrossTraces(rows, column, span) {
  return rows.filter((row) => row.pruner === "none").slice(0, LINES).map((row) => ({
    name: referenceName(row, row.quantization.startsWith("none") ? "full precision" : "dense"),
    x: span, y: span.map(() => 100 * row.cells[column].accuracy),
    line: { dash: row.quantization.startsWith("none") ? "dash" : "dashdot", width: 1.4, color: GREY },
    mode: "lines", type: "scatter", hoverinfo: "skip", meta: [data.rows.indexOf(row)],
  }));
}

function tokenTraces(rows, column, withPaper) {
  const runs = data.rows.filter((row) => row.kind === "run");
  const models = [...new Set(runs.map((row) => row.model))];
  const methods = [...new Set(runs.map(methodOf))];
  const drawn = rows.filter((row) => costOf(row) > 0 && cellOf(row, column));
  const own = drawn.filter((row) => row.kind === "run");
  const aside = sideways(own, methods);
  const best = new Set(frontier(own, column));
  const traces = methods.map((method, i) => {
    const made = trace(method, own.filter((row) => methodOf(row) === method), column, aside, { mode: "lines+markers" });
    const symbols = made.customdata.map((index) =>
      SYMBOLS[index === null ? 0 : models.indexOf(data.rows[index].model) % SYMBOLS.length]);
    const opacity = made.customdata.map((index) => (index === null || best.has(data.rows[index]) ? 1 : FADED));
    made.marker = { color: COLOURS[i % COLOURS.length], size: 8, symbol: symbols, opacity };
    made.line = { color: `${COLOURS[i % COLOURS.length]}80`, width: 1.2, dash: i < COLOURS.length ? "solid" : "dot" };
    made.error_y.color = `${made.marker.color}b0`;
    return made;
  }).filter((made) => made.x.length);
  if (own.length) {
    const tokens = own.map(costOf);
    const span = [Math.min(...tokens) / 1.2, Math.max(...tokens) * 1.2];
    traces.unshift(...acrossTraces(own, column, span));
    if (own.length > 1) traces.unshift(frontierTrace(own, column));
  }
  const paper = data.rows.filter((row) => row.kind === "paper" && costOf(row) > 0
    && (withPaper ? rows.includes(row) : true) && cellOf(row, column));
  if (paper.length) {
    traces.push(trace("paper (as published)", paper, column, () => 0, {
      mode: "markers",
      visible: withPaper ? true : "legendonly",
      marker: { symbol: "diamond-open", size: 9, color: GREY, line: { width: 1.5 } },
    }));
    traces.at(-1).error_y.color = `${GREY}b0`;
  }
  return { traces, drawn: drawn.length };
}

function drawTokens() {
  const column = byId("column").value;
  const { traces, drawn } = tokenTraces(visibleRows, column, byId("paper").checked);
  const hidden = visibleRows.length - drawn;
  byId("charted").textContent = `${drawn} rows drawn`
    + (hidden ? `; ${hidden} without ${column} or this cost.` : ".");
  if (!showChart("chart", drawn > 0)) return;
  const { layout, axis, narrow } = baseLayout("chart", 460);
  const chosen = byId("axis");
  const ticks = ["tokens", "layer_mean"].includes(chosen.value) ? { tickvals: TICKS, ticktext: TICKS.map(String) } : {};
  layout.xaxis = { ...axis, type: "log", exponentformat: "power", ...ticks, title: { text: chartText(chosen.selectedOptions[0].text) } };
  layout.yaxis = { ...axis, title: { text: narrow ? "" : `${chartText(column)} accuracy, %` } };
  if (narrow) layout.height = Math.min(760, 460 + 18 * Math.max(0, traces.length - 5));
  plot("chart", traces, layout);
}
