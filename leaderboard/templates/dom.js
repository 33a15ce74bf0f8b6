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
const plain = (value) => (value === null ? "–" : Number.isInteger(value) ? String(value) : value.toFixed(1));

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}
