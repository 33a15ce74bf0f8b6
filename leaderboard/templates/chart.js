// Accuracy against measured tokens, of the rows that the table shows. Plotly is only evaluated after the first paint.
const COLOURS = ["#2f7ec4", "#d55e00", "#009e73", "#cc79a7", "#c98a00", "#8a6fd1", "#5b8a3c", "#b5485d"];
const SYMBOLS = ["circle", "square", "triangle-up", "cross", "star", "hexagon", "pentagon", "x"];
const TICKS = Array.from({ length: 15 }, (_, i) => 2 ** i);

/** Plotly reads a small HTML in its texts, so a record's text is escaped for it, and cut where it is long. */
function chartText(text, limit = 60) {
  const cut = text.length > limit ? `${text.slice(0, limit - 1)}…` : text;
  return cut.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

const DODGE = 0.045; // octaves between neighbouring methods, so that bars at one budget do not hide each other

const position = (row) => row.tokens ?? row.keep ?? row.available;
const methodOf = (row) => (row.pruner === "none" ? "no pruning"
  : row.sensitivity === "none" ? row.pruner : `${row.pruner} + ${row.sensitivity}`);

function hover(row, cell, column) {
  const interval = cell.low === null ? "" : ` (${percent(cell.low)} – ${percent(cell.high)})`;
  const counts = cell.k === null ? "" : `, ${plain(cell.k)} / ${plain(cell.n)}`;
  return [
    `<b>${chartText(row.name)}</b>`, chartText(`${row.model} · ${row.quantization}`), chartText(methodOf(row)),
    chartText(`${column} ${percent(cell.accuracy)} %${interval}${counts}`),
    `${plain(position(row))} tokens${row.tokens === null ? " as stated" : ""}`,
  ].join("<br>");
}

/** Where rows of several methods have one budget, how far each stands aside, in octaves; elsewhere nothing. */
function sideways(rows, methods) {
  const at = new Map();
  for (const method of methods) {
    for (const row of rows.filter((candidate) => methodOf(candidate) === method)) {
      at.set(position(row), (at.get(position(row)) ?? new Set()).add(method));
    }
  }
  return (row) => {
    const sharing = [...(at.get(position(row)) ?? [])];
    const step = DODGE * Math.min(1, 10 / sharing.length);
    return step * (sharing.indexOf(methodOf(row)) - (sharing.length - 1) / 2);
  };
}

/** One trace. A gap parts runs that differ in more than their budget, so a line joins only what is comparable. */
function trace(name, rows, column, aside, extra) {
  const lineOf = (row) => JSON.stringify([row.model, row.quantization, row.pruner, row.fusion]);
  const sorted = rows.map((row) => [lineOf(row), row])
    .sort(([a, x], [b, y]) => (a === b ? position(x) - position(y) : a < b ? -1 : 1));
  const points = sorted.flatMap(([line, row], i) => (i && sorted[i - 1][0] !== line ? [null, row] : [row]));
  const cells = points.map((row) => row && row.cells[column]);
  const away = (end) => cells.map((cell) =>
    (cell && cell.low !== null ? 100 * Math.abs(cell[end] - cell.accuracy) : 0));
  return {
    name: chartText(name, 44),
    x: points.map((row) => row && position(row) * 2 ** aside(row)),
    y: cells.map((cell) => cell && 100 * cell.accuracy),
    error_y: { type: "data", symmetric: false, array: away("high"), arrayminus: away("low"), thickness: 1, width: 3 },
    hovertext: points.map((row, i) => (row ? hover(row, cells[i], column) : "")),
    customdata: points.map((row) => row && data.rows.indexOf(row)),
    hoverinfo: "text",
    type: "scatter",
    ...extra,
  };
}

function chartTraces(rows, column, withPaper) {
  const models = [...new Set(data.rows.filter((row) => row.kind === "run").map((row) => row.model))];
  const methods = [...new Set(data.rows.filter((row) => row.kind === "run").map(methodOf))];
  const drawn = rows.filter((row) => position(row) > 0 && (row.cells[column]?.accuracy ?? null) !== null);
  const aside = sideways(drawn.filter((row) => row.kind === "run"), methods);
  const traces = methods.map((method, i) => {
    const own = drawn.filter((row) => row.kind === "run" && methodOf(row) === method);
    const made = trace(method, own, column, aside, { mode: "lines+markers" });
    const symbols = made.customdata.map((index) =>
      SYMBOLS[index === null ? 0 : models.indexOf(data.rows[index].model) % SYMBOLS.length]);
    made.marker = { color: COLOURS[i % COLOURS.length], size: 8, symbol: symbols };
    made.line = { color: `${COLOURS[i % COLOURS.length]}80`, width: 1.2, dash: i < COLOURS.length ? "solid" : "dot" };
    made.error_y.color = `${made.marker.color}b0`;
    return made;
  }).filter((made) => made.x.length);
  const paper = data.rows.filter((row) => row.kind === "paper" && position(row) > 0
    && (withPaper ? rows.includes(row) : true) && (row.cells[column]?.accuracy ?? null) !== null);
  if (paper.length) {
    traces.push(trace("paper (as published)", paper, column, () => 0, {
      mode: "markers",
      visible: withPaper ? true : "legendonly",
      marker: { symbol: "diamond-open", size: 9, color: "#8a8f98", line: { width: 1.5 } },
    }));
    traces.at(-1).error_y.color = "#8a8f98b0";
  }
  return { traces, drawn: drawn.length };
}

function chartLayout(column) {
  const chart = byId("chart");
  const style = getComputedStyle(chart);
  const narrow = chart.clientWidth < 640;
  const axis = { gridcolor: style.borderTopColor, zeroline: false, automargin: true };
  return {
    height: narrow ? 460 : 440,
    margin: { l: 12, r: 16, t: 20, b: 12 },
    font: { family: style.fontFamily, size: 13, color: style.color },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    hoverlabel: { align: "left", font: { family: style.fontFamily } },
    hovermode: "closest",
    showlegend: true,
    legend: narrow ? { orientation: "h", y: -0.28, font: { size: 12 } } : { x: 1.02, y: 1 },
    xaxis: { ...axis, type: "log", tickvals: TICKS, ticktext: TICKS.map(String), title: { text: "Vision tokens" } },
    yaxis: { ...axis, title: { text: narrow ? "" : `${chartText(column)} accuracy, %` } },
    uirevision: "kept",
  };
}

let visibleRows = data.rows;

function drawChart() {
  if (!window.Plotly) return;
  const column = byId("column").value;
  const { traces, drawn } = chartTraces(visibleRows, column, byId("paper").checked);
  const layout = chartLayout(column);
  if (!drawn) { // nothing to find a range from
    layout.xaxis.range = [Math.log10(4), Math.log10(1024)];
    layout.yaxis.range = [0, 100];
  }
  const hidden = visibleRows.length - drawn;
  byId("charted").textContent = `${drawn} rows drawn`
    + (hidden ? `; ${hidden} without ${column} or tokens.` : ".");
  window.Plotly.react("chart", traces, layout, { displaylogo: false, responsive: true });
}

function startChart() {
  const script = document.createElement("script");
  script.textContent = byId("plotly").textContent; // the same text, so the same hash as the policy allows
  document.head.append(script);
  drawChart();
  byId("chart").on("plotly_click", (event) => {
    const index = event.points[0].customdata;
    if (index !== null) openDetails(index);
  });
  byId("column").addEventListener("change", drawChart);
}
