// The study of which metric predicts the harm of leaving a token out.
const rhoText = (found) => (found.rho === null ? "–" : withSign(found.rho, 3));

function studyTable(study) {
  const targets = Object.keys(study.targets);
  const lines = study.predictors.map((one) => [
    one.kind === "metric" ? one.name : `${one.name} (relevance)`,
    ...targets.map((target) => {
      const found = one.correlations[target];
      const cell = make("span", found.low > 0 ? "better" : found.high < 0 ? "worse" : "", rhoText(found));
      return make("span", "", cell, make("small", "", found.rho === null ? "" : `${withSign(found.low, 2)} … ${withSign(found.high, 2)}`));
    }),
  ]);
  return grid(["Score", "Answer, quantized", "Error of what stays", "Answer, full precision"], lines, [1, 2, 3]);
}

function studyTraces(study) {
  const names = study.predictors.map((one) => chartText(one.kind === "metric" ? one.name : `${one.name} (relevance)`, 28)).reverse();
  const labels = { answer: "answer, quantized", error: "error of what stays", full: "answer, full precision" };
  return Object.keys(study.targets).map((target, i) => {
    const found = study.predictors.map((one) => one.correlations[target]).reverse();
    return {
      name: labels[target] ?? target, type: "scatter", mode: "markers", hoverinfo: "text",
      x: found.map((one) => one.rho), y: names.map((_, at) => at + 0.22 * (1 - i)),
      error_x: {
        type: "data", symmetric: false, thickness: 1.2, width: 3, color: `${COLOURS[i]}b0`,
        array: found.map((one) => (one.rho === null ? 0 : one.high - one.rho)),
        arrayminus: found.map((one) => (one.rho === null ? 0 : one.rho - one.low)),
      },
      hovertext: found.map((one, at) => `<b>${names[at]}</b><br>${labels[target] ?? ""}: rho ${rhoText(one)}, ${one.n} questions`),
      marker: { size: 8, color: COLOURS[i], symbol: SYMBOLS[i] },
      visible: target === "full" ? "legendonly" : true, meta: names,
    };
  });
}

function drawStudy() {
  const select = byId("study");
  if (!select) return;
  const study = data.studies[Number(select.value)];
  const unit = study.block === 1 ? "visual token" : `block of ${study.block} × ${study.block} visual tokens`;
  byId("study-text").replaceChildren(
    make("p", "", `Every ${unit} of an image was left out in turn, for ${plural(study.questions, "question")} of ${study.task}`
      + ` (${study.units} omissions, of which ${percent(study.changed, 1)} % change the answer), and the real change of ${study.model} under ${study.quantization} measured.`
      + " Shown is Spearman’s rank correlation of each score with that harm over the tokens of an image, mean over questions;"
      + " bars are bootstrap 95 % intervals over questions. A score that says which tokens to keep should stand right of zero."),
    make("ul", "", ...Object.entries(study.targets).map(([name, meaning]) =>
      make("li", "", `${{ answer: "Answer, quantized", error: "Error of what stays", full: "Answer, full precision" }[name] ?? name}: ${meaning}.`))));
  byId("study-table").replaceChildren(studyTable(study));
  if (!showChart("study-chart", study.predictors.length > 0)) return;
  const traces = studyTraces(study);
  const { layout, axis } = baseLayout("study-chart", 90 + 40 * Math.max(study.predictors.length, 4));
  const names = traces[0]?.meta ?? [];
  layout.xaxis = { ...axis, zeroline: true, zerolinecolor: GREY, title: { text: "Spearman’s rho" } };
  layout.yaxis = { ...axis, tickvals: names.map((_, i) => i), ticktext: names, range: [-0.6, names.length - 0.4] };
  layout.legend = { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" };
  plot("study-chart", traces, layout);
}

function startStudy() {
  byId("study")?.addEventListener("change", drawStudy);
}
