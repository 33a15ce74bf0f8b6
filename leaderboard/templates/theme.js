// Before the first paint: the table waits for its script, so that it is laid out once; and the theme chosen earlier, where one was. Without it the system's own applies.
document.documentElement.dataset.drawing = "table";
try {
  const stored = localStorage.getItem("qapbench-theme");
  if (stored === "light" || stored === "dark") document.documentElement.dataset.theme = stored;
} catch {
  // Storage may be closed to local files; the system's theme stays.
}
