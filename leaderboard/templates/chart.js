// What the charts share. Plotly is only evaluated after the first paint.
const COLOURS = ["#2f7ec4", "#d55e00", "#009e73", "#cc79a7", "#c98a00", "#8a6fd1", "#5b8a3c", "#b5485d"];
const SYMBOLS = ["circle", "square", "triangle-up", "cross", "star", "hexagon", "pentagon", "x"];
const GREY = "#8a8f98";

/** Plotly reads a small HTML in its texts, so a record's text is escaped for it, and cut where it is long. */
function chartText(text, limit = 60) {
  const cut = text.length > limit ? `${text.slice(0, limit - 1)}…` : text;
  return cut.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

const position = (row) => row.tokens ?? row.keep ?? row.available;
const methodOf = (row) => (row.pruner === "none" ? "no pruning"
  : row.sensitivity === "none" ? prunerOf(row) : `${prunerOf(row)} + ${row.sensitivity}`);
const baseOf = (pruner) => pruner.split(" (")[0];

/** A pruner without its parameters where all rows have the same ones. */
function prunerOf(row) {
  const base = baseOf(row.pruner);
  return data.rows.every((other) => other.pruner === row.pruner || baseOf(other.pruner) !== base) ? base : row.pruner;
}

/** A reference's name, with what it is a reference for where the name does not say so. */
const referenceName = (row, what) => chartText(row.name.toLowerCase().includes(what) ? row.name : `${what}: ${row.name}`, 44);
const cellOf = (row, column) => (Object.hasOwn(row.cells, column) && row.cells[column].accuracy !== null ? row.cells[column] : null);

function hover(row, cell, column) {
  const interval = cell.low === null ? "" : ` (${percent(cell.low)} – ${percent(cell.high)})`;
  const counts = cell.k === null ? "" : `, ${plain(cell.k)} / ${plain(cell.n)}`;
  return [
    `<b>${chartText(row.name)}</b>`, chartText(`${row.model} · ${row.quantization}`), chartText(methodOf(row)),
    chartText(`${column} ${percent(cell.accuracy)} %${interval}${counts}`),
    `${plain(position(row))} tokens${row.tokens === null ? " as stated" : ""}`, ...costWords(row),
  ].join("<br>");
}

/** Lengths of an interval's two sides in percent points, as Plotly takes them. */
function whiskers(cells) {
  const away = (end) => cells.map((cell) => (cell && cell.low !== null ? 100 * Math.abs(cell[end] - cell.accuracy) : 0));
  return { type: "data", symmetric: false, array: away("high"), arrayminus: away("low"), thickness: 1, width: 3 };
}

function baseLayout(id, height) {
  const chart = byId(id);
  const style = getComputedStyle(chart);
  const narrow = chart.clientWidth < 640;
  return {
    narrow,
    axis: { gridcolor: style.borderTopColor, zeroline: false, automargin: true },
    layout: {
      height,
      margin: { l: 14, r: 16, t: narrow ? 20 : 36, b: 22 }, // the toolbar lies above the plot
      font: { family: style.fontFamily, size: 13, color: style.color },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      hoverlabel: { align: "left", font: { family: style.fontFamily } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: GREY, activecolor: style.color },
      hovermode: "closest",
      showlegend: true,
      legend: narrow ? { orientation: "h", y: -0.28, font: { size: 12 } } : { x: 1.02, y: 1 },
      uirevision: "kept",
    },
  };
}

/** The buttons of a chart's toolbar. Plotly's own list has one that sends the chart to its makers' server. */
const TOOLS = [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]];
const CLICKABLE = ["chart", "metrics"]; // a click on a point of these opens its run

/** Hide a chart that has nothing to draw; the line below it says why. True if there is something. */
function showChart(id, any) {
  byId(id).hidden = !any;
  return any;
}

/** A figure as tall as its layout says, whatever it was before. Where fingers draw, it has no toolbar and no zoom box. */
function plot(id, traces, layout) {
  const chart = byId(id);
  const pointer = !matchMedia("(hover: none)").matches && chart.clientWidth >= 640;
  chart.style.height = `${layout.height}px`;
  window.Plotly.react(id, traces, { ...layout, dragmode: pointer ? "zoom" : false }, {
    displaylogo: false, responsive: true, displayModeBar: pointer ? "hover" : false,
    modeBarButtons: TOOLS, showSendToCloud: false, plotlyServerURL: "",
  });
  if (CLICKABLE.includes(id) && !chart.dataset.clickable) {
    chart.dataset.clickable = "yes";
    chart.on("plotly_click", (event) => {
      const index = event.points[0].customdata;
      if (typeof index === "number") openDetails(index);
    });
  }
}

let visibleRows = data.rows;

/** What depends on the rows of the table, the column that is chosen and the theme. */
const figures = () => [drawTokens, drawMetrics, drawHeat, drawStudy];

function drawFigures() {
  later(...figures());
}

/** Plotly itself. A hidden tab gets no frames, so nothing is drawn there until it is looked at. */
function startPlotly() {
  const script = document.createElement("script");
  script.textContent = byId("plotly").textContent; // the same text, so the same hash as the policy allows
  document.head.append(script);
}

function startCharts() {
  for (const id of ["column", "axis"]) byId(id).addEventListener("change", drawFigures);
}
