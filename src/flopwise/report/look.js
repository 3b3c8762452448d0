// Moves the view over the image of `flopwise look`: wheel, drag, keys and buttons change the SVG's viewBox.
const svg = document.querySelector(".viewer");
const whole = svg.viewBox.baseVal;
const all = { x: whole.x, y: whole.y, width: whole.width, height: whole.height };
let view = { ...all };

function show(next) {
  const width = Math.min(Math.max(next.width, 32), all.width);
  const height = (width * all.height) / all.width;
  view = {
    x: Math.min(Math.max(next.x, all.x), all.x + all.width - width),
    y: Math.min(Math.max(next.y, all.y), all.y + all.height - height),
    width,
    height,
  };
  svg.setAttribute("viewBox", `${view.x} ${view.y} ${view.width} ${view.height}`);
}

function zoom(factor, x = view.x + view.width / 2, y = view.y + view.height / 2) {
  const width = Math.min(Math.max(view.width * factor, 32), all.width);
  const ratio = width / view.width;
  show({ x: x - (x - view.x) * ratio, y: y - (y - view.y) * ratio, width });
}

function place(event) {
  const box = svg.getBoundingClientRect();
  return [
    view.x + ((event.clientX - box.left) / box.width) * view.width,
    view.y + ((event.clientY - box.top) / box.height) * view.height,
  ];
}

svg.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoom(event.deltaY > 0 ? 1.25 : 0.8, ...place(event));
}, { passive: false });

let held = null;
svg.addEventListener("pointerdown", (event) => {
  held = place(event);
  svg.setPointerCapture(event.pointerId);
});
svg.addEventListener("pointermove", (event) => {
  if (!held) return;
  const [x, y] = place(event);
  show({ ...view, x: view.x + held[0] - x, y: view.y + held[1] - y });
});
svg.addEventListener("pointerup", () => { held = null; });
svg.addEventListener("pointercancel", () => { held = null; });

const keys = { ArrowLeft: [-0.2, 0], ArrowRight: [0.2, 0], ArrowUp: [0, -0.2], ArrowDown: [0, 0.2] };
svg.addEventListener("keydown", (event) => {
  const step = keys[event.key];
  if (step) show({ ...view, x: view.x + step[0] * view.width, y: view.y + step[1] * view.height });
  else if (event.key === "+") zoom(0.8);
  else if (event.key === "-") zoom(1.25);
  else return;
  event.preventDefault();
});

const actions = { in: () => zoom(0.5), out: () => zoom(2), all: () => show(all) };
for (const button of document.querySelectorAll("[data-do]")) {
  button.addEventListener("click", actions[button.dataset.do]);
}
for (const box of document.querySelectorAll("[data-show]")) {
  box.addEventListener("change", () => svg.classList.toggle(`no-${box.dataset.show}`, !box.checked));
}
for (const button of document.querySelectorAll("[data-patch]")) {
  button.addEventListener("click", () => {
    const at = svg.querySelector(`[data-number="${button.dataset.patch}"]`);
    const [x, y, width, height] = ["x", "y", "width", "height"].map((name) => Number(at.getAttribute(name)));
    const wide = Math.max(3 * width, (3 * height * all.width) / all.height);
    show({ x: x + width / 2 - wide / 2, y: y + height / 2 - (wide * all.height) / all.width / 2, width: wide });
    svg.scrollIntoView({ block: "center" });
  });
}
