// Accuracy of each sensitivity metric, of the rows that the table shows; meaning alone and unpruned rows as lines.
const SERIES = 8; // combinations of model, quantization, pruner and budget that get a colour of their own

const seriesOf = (row) => JSON.stringify([row.model, row.quantization, prunerOf(row), row.fusion === "none" ? "" : row.fusion, row.keep]);

/** What tells this series from the others, in words. */
function seriesName(key, keys) {
  const all = keys.map((other) => JSON.parse(other));
  const own = JSON.parse(key);
  const words = own.flatMap((value, i) => (new Set(all.map((parts) => parts[i])).size > 1 || i === 2 || i === 4
    ? [i === 4 ? `${plain(value)} tokens` : value] : []));
  return words.filter(Boolean).join(" · ");
}

function metricTraces(column) {
  const rows = visibleRows.filter((row) => row.pruner !== "none" && cellOf(row, column));
  const withMetric = rows.filter((row) => row.sensitivity !== "none");
  const best = new Map();
  for (const row of withMetric) {
    best.set(row.sensitivity, Math.max(best.get(row.sensitivity) ?? 0, row.cells[column].accuracy));
  }
  const metrics = [...best.keys()].sort((a, b) => best.get(b) - best.get(a));
  const keys = [...new Set(withMetric.map(seriesOf))].slice(0, SERIES);
  const traces = keys.map((key, i) => {
    const own = withMetric.filter((row) => seriesOf(row) === key);
    const cells = own.map((row) => row.cells[column]);
    const colour = COLOURS[i % COLOURS.length];
    return {
      name: chartText(seriesName(key, keys), 44), type: "scatter", mode: "markers", hoverinfo: "text",
      x: own.map((row) => metrics.indexOf(row.sensitivity) + 0.7 * ((i + 1) / (keys.length + 1) - 0.5)),
      y: cells.map((cell) => 100 * cell.accuracy),
      error_y: { ...whiskers(cells), color: `${colour}b0` },
      marker: { color: colour, size: 9, symbol: SYMBOLS[i % SYMBOLS.length] },
      hovertext: own.map((row, j) => hover(row, cells[j], column)),
      customdata: own.map((row) => data.rows.indexOf(row)),
    };
  });
  const across = (name, row, line) => ({
    name, type: "scatter", mode: "lines", hoverinfo: "text",
    x: [-0.5, metrics.length - 0.5], y: [1, 1].map(() => 100 * row.cells[column].accuracy),
    hovertext: [1, 1].map(() => hover(row, row.cells[column], column)), line,
  });
  const referenced = (kind) => [...new Set(withMetric.flatMap((row) => (row.against[kind] ? [row.against[kind].row] : [])))]
    .map((index) => data.rows[index]).filter((row) => cellOf(row, column)).slice(0, 4);
  for (const row of metrics.length ? referenced("semantic") : []) {
    const series = keys.findIndex((key) => withMetric.some((other) => seriesOf(other) === key && other.against.semantic?.name === row.name));
    traces.push(across(referenceName(row, "semantic only"), row, { dash: "dot", width: 1.6, color: COLOURS[Math.max(series, 0) % COLOURS.length] }));
  }
  for (const row of metrics.length ? referenced("dense") : []) {
    traces.push(across(referenceName(row, "dense"), row, { dash: "dashdot", width: 1.4, color: GREY }));
  }
  return { traces, metrics, drawn: keys.length < new Set(withMetric.map(seriesOf)).size ? `the first ${SERIES} of ${new Set(withMetric.map(seriesOf)).size} combinations drawn` : "" };
}

function drawMetrics() {
  const column = byId("column").value;
  const { traces, metrics, drawn } = metricTraces(column);
  byId("metricked").textContent = metrics.length ? drawn : "No row of the table has a sensitivity metric.";
  if (!showChart("metrics", metrics.length > 0)) return;
  const { layout, axis, narrow } = baseLayout("metrics", 420);
  layout.xaxis = {
    ...axis, tickvals: metrics.map((_, i) => i), ticktext: metrics.map((name) => chartText(name, 28)),
    range: [-0.5, metrics.length - 0.5], tickangle: narrow || metrics.length > 10 ? -40 : 0,
  };
  layout.yaxis = { ...axis, title: { text: narrow ? "" : `${chartText(column)} accuracy, %` } };
  layout.legend = { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: narrow ? 12 : 13 } };
  plot("metrics", traces, layout);
}
