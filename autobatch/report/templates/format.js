// Numbers as the rest of the page writes them: the same rules as autobatch.support.units.
function formatBytes(bytes) {
  for (const [unit, scale] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (Math.abs(bytes) >= scale) {
      const size = Math.abs(bytes) / scale, digits = size < 10 ? 2 : size < 100 ? 1 : 0;
      return (bytes < 0 ? "-" : "") + rounded(Math.abs(bytes), scale, digits) + " " + unit;
    }
  }
  return bytes + " B";
}
// As Python rounds: a half goes to the even neighbour, where toFixed would go up.
function rounded(bytes, scale, digits) {
  const parts = bytes * 10 ** digits, rest = parts % scale, whole = (parts - rest) / scale;
  const isUp = 2 * rest > scale || (2 * rest === scale && whole % 2 === 1);
  return ((whole + isUp) / 10 ** digits).toFixed(digits);
}
const formatCount = (number) => number.toLocaleString("en-US");
const counted = (number, noun) => formatCount(number) + " " + noun + (number === 1 ? "" : "s");
const percent = (share) => (100 * share).toFixed(share < 0.0995 ? 1 : 0) + " %";
const byId = (id) => document.getElementById(id);
// Text becomes text, whatever it holds: nothing of the plan is ever parsed as markup.
function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}
const CATEGORY_CLASSES = {
  "parameters": "c-parameters", "buffers": "c-buffers", "gradients": "c-gradients",
  "optimizer state": "c-optimizer", "activations": "c-activations", "temporaries": "c-temporaries",
  "inputs": "c-inputs", "workspace": "c-workspace", "other": "c-other", "rounding": "c-rounding",
};
const SHORT = { forward: "fwd", backward: "bwd", step: "step" };
const PHASES = ["setup", "inputs", "forward", "backward", "step", "evaluate"];
// Phases that belong to no micro-batch: what is before the windows, and what is after all of theirs.
const WITHOUT_MICRO_BATCH = ["setup", "step", "evaluate"];
function phaseText([, phase, window, microBatch]) {
  if (phase === "setup") return "setup, before window " + (window + 1);
  if (WITHOUT_MICRO_BATCH.includes(phase)) return phase + " of window " + (window + 1);
  return phase + " of micro-batch " + (microBatch + 1) + ", window " + (window + 1);
}
// Round numbers below an end, equally far apart.
function roundSteps(end, most) {
  const rough = Math.max(end / most, 1e-9);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max([1, 2, 5, 10].map((times) => times * power).find((size) => size >= rough), 1);
  return Array.from({ length: Math.floor(end / step) }, (_, index) => step * (index + 1));
}
function drawRows(target, top) {
  const [name, unit] = top >= 4 * 2 ** 30 ? ["GiB", 2 ** 30] : ["MiB", 2 ** 20];
  target.replaceChildren(...[0, ...roundSteps(top / unit, 5)].flatMap((step) => {
    const at = 100 * (1 - step * unit / top) + "%";
    const line = element("span", "gridline"), label = element("span", "row", step + " " + name);
    line.style.top = label.style.top = at;
    return [line, label];
  }));
}
