// One run in full, in a dialog: spec, scores, receipt, environment, timing.

function section(title, ...children) {
  return make("section", "", make("h3", "", title), ...children);
}

function pairs(entries) {
  const list = make("dl", "");
  for (const [key, value] of entries) list.append(make("dt", "", key), make("dd", "", value));
  return list;
}

function bullets(texts) {
  return make("ul", "", ...texts.map((text) => make("li", "", text)));
}

async function copyText(text, source) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    getSelection().selectAllChildren(source); // no clipboard access: select it, and try the older way
    document.execCommand("copy");
  }
}

function yamlBlock(yaml) {
  const code = make("code", "", yaml);
  const button = make("button", "", "Copy");
  button.type = "button";
  button.addEventListener("click", async () => {
    await copyText(yaml, code);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  return make("div", "yaml", button, make("pre", "", code));
}

function scoreTable(row) {
  const lines = [...Object.entries(row.cells), ["unparsed", row.unparsed]].map(([name, cell]) =>
    cell.plain !== null ? [name, cell.plain.toPrecision(4), plain(cell.n), "", "over all questions"]
    : cell.accuracy === null
      ? [name, "–", "", "", cell.reason]
      : [name, percent(cell.accuracy), `${plain(cell.k)} / ${plain(cell.n)}`,
        cell.low === null ? "–" : `${percent(cell.low)} – ${percent(cell.high)}`, ""]);
  return grid(["Column", "%", "k / n", "95 % interval", ""], lines, [1, 2, 3]);
}

/** Against its references, on all questions. */
function versusTable(row) {
  const named = ([kind, one]) => [kind === "semantic" ? "semantic only" : kind, one];
  const kinds = [
    ...Object.entries(row.against).map(named),
    ...Object.entries(row.by_task ?? {}).flatMap(([label, { against }]) =>
      Object.entries(against).map(named).map(([kind, one]) => [`${label}, ${kind}`, one])),
  ];
  if (!kinds.length) return null;
  const lines = kinds.map(([kind, one]) => [
    kind, one.name, signed(one.difference),
    `${signed(one.low)} … ${signed(one.high)}`,
    one.gained === null ? "unpaired" : `+${one.gained} −${one.lost}`, shortP(one.p), shortP(one.q),
  ]);
  const rank = row.rank === null ? null : make("p", "", `Rank ${row.rank} among ${plural(row.among, "row")} on the same questions`
    + (row.left_out ? `, without ${row.left_out} that not all of them were asked.` : "."));
  const moved = row.moved ? make("div", "banner", row.moved) : null;
  return section("Comparisons", rank, moved,
    grid(["Against", "Row", "Points", "95 % interval", "Flips", "p", "q"], lines, [2, 3, 4, 5, 6]));
}

function flipSection(index) {
  const cards = flipCards(index);
  return cards && section(`Flipped against ${references(index)}`, cards);
}

function tokenLine(row) {
  if (row.tokens === null) return null;
  const merged = row.merged ? `: ${plain(row.kept)} kept and ${plain(row.merged)} merged` : "";
  const spread = row.tokens_min === row.tokens_max ? "" : `, between ${plain(row.tokens_min)} and ${plain(row.tokens_max)}`;
  const of = row.available === null ? "" : ` of ${plain(row.available)}`;
  return make("p", "", `${plain(row.tokens)}${of} vision tokens per image as measured${merged}${spread}.`);
}

/** What a prompt of the run costs, with the heads of the table. */
function costSection(row) {
  const named = [...byId("axis").options].filter((option) => Object.hasOwn(row.costs, option.value));
  return named.length ? section("Cost of a prompt",
    pairs(named.map((option) => [option.text, Number(row.costs[option.value].toPrecision(4)).toString()]))) : null;
}

function linearsTable(table) {
  const show = (value) => (value === null ? "–" : typeof value === "object" ? JSON.stringify(value) : String(value));
  const numeric = table.keys.map((_, i) => i).filter((i) => table.rows.every((row) => typeof row[i] !== "string"));
  const box = make("details", "", make("summary", "", `Every linear (${table.rows.length})`));
  box.addEventListener("toggle", () => {
    const heads = table.keys.map((key) => key.replaceAll("_", " "));
    if (box.children.length === 1) box.append(grid(heads, table.rows.map((row) => row.map(show)), numeric));
  });
  return box;
}

function runSections(row, detail, index) {
  const linears = data.linears[detail.linears];
  return [
    detail.notes.length ? make("div", "banner", bullets(detail.notes)) : null,
    detail.yaml ? section("Spec", yamlBlock(detail.yaml),
      make("p", "facts", "Saved as spec.yaml, this makes the row again: qapbench run spec.yaml")) : null,
    section("Scores", scoreTable(row)),
    versusTable(row),
    flipSection(index),
    section("Receipt", make("p", "", row.receipt || "The record holds no receipt."), tokenLine(row),
      detail.fallbacks.length ? make("div", "banner", make("strong", "", "Fallbacks"), bullets(detail.fallbacks)) : null,
      linears.rows.length ? linearsTable(linears) : null),
    costSection(row),
    detail.timing.length ? section("Timing", pairs(detail.timing)) : null,
    detail.environment.length ? section("Environment", pairs(detail.environment)) : null,
    section("Identity", pairs([["run id", row.run_id || "–"], ["created", row.created || "–"], ...detail.fingerprints])),
  ];
}

function paperSections(row) {
  return [
    section("Scores", scoreTable(row)),
    versusTable(row),
    section("Source", make("p", "", `${row.run_id}: ${row.model}, ${row.quantization}, `
      + `${plain(row.keep ?? row.available)} vision tokens as stated. k is derived from the printed percentage.`)),
  ];
}

function openDetails(index) {
  const row = data.rows[index];
  const title = make("h2", "", row.name);
  title.id = "details-title";
  const close = make("button", "", "Close");
  close.type = "button";
  close.addEventListener("click", () => byId("details").close());
  const what = [row.model, row.quantization, row.pruner, row.sensitivity].filter((text) => text && text !== "none");
  const sections = row.kind === "paper" ? paperSections(row) : runSections(row, data.details[index], index);
  byId("details").replaceChildren(
    make("div", "bar", title, close), make("p", "facts", what.join(" · ")), ...sections.filter((part) => part));
  byId("details").showModal();
  byId("details").scrollTop = 0;
}

// A click on the backdrop arrives at the dialog itself.
byId("details").addEventListener("click", (event) => {
  if (event.target === byId("details")) byId("details").close();
});
