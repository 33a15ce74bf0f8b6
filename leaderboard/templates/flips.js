// Questions that a row answers otherwise than its reference, each with the image and what both kept of it.
const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** The image under a grid of tokens: those that were dropped are covered. */
function maskedImage(image, side, label) {
  const picture = svg("svg", { viewBox: "0 0 100 100", role: "img", "aria-label": label });
  picture.append(svg("image", { href: image, width: 100, height: 100, preserveAspectRatio: "xMidYMid slice" }));
  if (side.kept && side.grid) {
    const [rows, columns] = side.grid;
    const kept = new Set(side.kept);
    const [w, h] = [100 / columns, 100 / rows];
    let dropped = "";
    let edges = "";
    for (let i = 0; i < rows * columns; i += 1) {
      const box = `M${(i % columns) * w} ${Math.floor(i / columns) * h}h${w}v${h}h${-w}z`;
      if (kept.has(i)) edges += box;
      else dropped += box;
    }
    picture.append(svg("path", { d: dropped, class: "dropped" }), svg("path", { d: edges, class: "kept" }));
  }
  return picture;
}

function keptText(side) {
  if (!side.kept) return side.grid ? "all tokens" : "tokens not stored";
  const merged = side.merged ? ` + ${side.merged} merged` : "";
  return `${side.kept.length} kept${merged}`;
}

function flipCard(flip, names, counts_right) {
  const question = data.flips.questions[flip.question];
  const card = make("article", "flip");
  const asked = make("p", "asked", question.text);
  if (question.hint) asked.append(make("small", "", question.hint));
  const choices = make("ol", "choices", ...question.choices.map((choice, i) => {
    const letter = String.fromCharCode(65 + i);
    const who = flip.sides.flatMap((side, place) => (side.answer === letter ? [names[place]] : []));
    return make("li", letter === question.truth ? "truth" : "", choice,
      who.length ? make("small", "", `answered by ${who.join(" and ")}`) : null);
  }));
  const sides = flip.sides.map((side, place) => {
    const right = side.score === 1;
    const mark = counts_right ? (right ? "✓" : "✗") : side.score.toFixed(2);
    const caption = make("figcaption", "", make("span", "who", names[place]),
      make("span", right ? "right" : "wrong", `${mark} ${side.answer || "–"}`),
      make("small", "", question.image ? keptText(side) : "no image"));
    return make("figure", "", question.image ? maskedImage(question.image, side, `${names[place]}: ${keptText(side)}`) : null,
      caption);
  });
  card.append(make("div", "pair", ...sides), asked, choices, make("small", "id", question.id));
  return card;
}

const DIRECTIONS = [
  ["gained", "right where the reference is wrong", "scored higher than by the reference"],
  ["lost", "wrong where the reference is right", "scored lower than by the reference"],
];

/** Names of the references of a row's flips, each once. */
function references(index) {
  return [...new Set(data.flips.rows[index].map((flips) => flips.against))].join(", ");
}

/** Both directions of a row's flips, task by task; null where the row has no reference. */
function flipCards(index) {
  const several = data.flips.rows[index];
  if (!several) return null;
  const box = make("div", "");
  for (const flips of several) {
    const names = [flips.against, data.rows[index].name];
    const task = flips.task ? `${flips.task}: ` : "";
    for (const [direction, verb, scored] of DIRECTIONS) {
      const { count, shown } = flips[direction];
      box.append(make("h3", "", `${task}${plural(count, "question")} ${direction}: ${flips.counts_right ? verb : scored}`
        + (shown.length < count ? `; ${shown.length} drawn` : "")));
      if (shown.length) {
        box.append(make("div", "cards", ...shown.map((flip) => flipCard(flip, names, flips.counts_right))));
      }
    }
  }
  return box;
}

/** How many more questions a row gained than it lost. */
function gainOf(index) {
  return data.flips.rows[index].reduce((sum, flips) => sum + flips.gained.count - flips.lost.count, 0);
}

function drawFlips() {
  const select = byId("flip-row");
  if (select) byId("flips").replaceChildren(flipCards(Number(select.value)) ?? make("p", "", "No row has a reference to flip against."));
}

function startFlips() {
  const select = byId("flip-row");
  if (!select) return;
  const rows = Object.keys(data.flips.rows).map(Number);
  fill(select, rows.map((index) => [index, `${data.rows[index].name} against ${references(index)}`]));
  // First what the page is about: a sensitivity against meaning alone.
  const first = rows.filter((index) => data.rows[index].sensitivity !== "none")
    .sort((a, b) => gainOf(b) - gainOf(a))[0];
  if (first !== undefined) select.value = String(first);
  select.addEventListener("change", drawFlips);
  drawFlips();
}
