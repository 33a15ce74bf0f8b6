// Shared by the scripts that follow. Texts from records only ever enter the page as text nodes.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

/** An element with text or child nodes; `className` may be empty. */
function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children.filter((child) => child !== null));
  return element;
}

const percent = (share, digits = 2) => (share === null ? "–" : (100 * share).toFixed(digits));
const withSign = (value, digits) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}`;
const signed = (share, digits = 2) => (share === null ? "–" : withSign(100 * share, digits));
const plain = (value) => (value === null ? "–" : Number.isInteger(value) ? String(value) : value.toFixed(1));
const shortP = (p) => (p < 0.001 ? p.toExponential(1) : p.toPrecision(2));
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

/** A table in a box that scrolls sideways. Cells are texts or nodes. */
function grid(heads, lines, numeric = []) {
  const head = make("tr", "", ...heads.map((text, i) => make("th", numeric.includes(i) ? "num" : "", text)));
  const body = lines.map((line) =>
    make("tr", "", ...line.map((cell, i) => make("td", numeric.includes(i) ? "num" : "", cell))));
  return make("div", "scroll", make("table", "", make("thead", "", head), make("tbody", "", ...body)));
}

let pending = 0;

/** Do these one after another, each in a task of its own, so that the page answers in between; the latest call counts. */
function later(...tasks) {
  const mine = ++pending;
  document.documentElement.dataset.drawing = "figures";
  const next = () => {
    if (mine !== pending) return;
    const task = tasks.shift();
    if (task) {
      task();
      setTimeout(next);
    } else {
      delete document.documentElement.dataset.drawing;
    }
  };
  requestAnimationFrame(() => setTimeout(next));
}

/** Fill a select with [value, text] pairs. */
function fill(select, options) {
  select.replaceChildren(...options.map(([value, text]) => {
    const option = make("option", "", text);
    option.value = value;
    return option;
  }));
}
