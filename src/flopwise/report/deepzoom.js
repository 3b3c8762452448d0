// Draws the tiles of a pyramid, the coarse ones first. Drag, pinch, and keys + - 0 and arrows move the view; so does the
// wheel, once the image has the focus, so that it never takes the page's own scrolling away.
"use strict";
for (const zoom of document.querySelectorAll(".zoom")) {
  const canvas = zoom.querySelector("canvas");
  const pen = canvas.getContext("2d");
  const page = JSON.parse(zoom.querySelector("script").textContent);
  const pictures = new Map();
  const pointers = new Map();
  const view = { x: 0, y: 0, scale: 1 }; // the image's point at the upper left corner; canvas pixels per image pixel
  let whole = 1; // the scale at which all of it is seen
  let waiting = false;

  function picture(uri) {
    let found = pictures.get(uri);
    if (!found) {
      found = new Image();
      found.onload = later;
      found.src = uri;
      pictures.set(uri, found);
    }
    return found.complete && found.naturalWidth ? found : null;
  }

  function later() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      draw();
    });
  }

  function place(y, x, height, width) {
    return [(x - view.x) * view.scale, (y - view.y) * view.scale, width * view.scale, height * view.scale];
  }

  function seen([x, y, width, height]) {
    return x < canvas.width && y < canvas.height && x + width > 0 && y + height > 0;
  }

  function draw() {
    pen.clearRect(0, 0, canvas.width, canvas.height);
    for (const level of page.levels) {
      const [dy, dx] = [page.height / level.height, page.width / level.width];
      for (const [key, uri] of Object.entries(level.tiles)) {
        const [y, x] = key.split(",").map((n) => n * page.tile);
        const at = place(y * dy, x * dx, Math.min(page.tile, level.height - y) * dy, Math.min(page.tile, level.width - x) * dx);
        const found = seen(at) && picture(uri);
        if (found) pen.drawImage(found, ...at);
      }
      if (level.downsample * view.scale <= 1) break; // finer ones would not be seen
    }
    if (page.overlay && !zoom.querySelector("input:not(:checked)")) {
      const found = picture(page.overlay.uri);
      pen.imageSmoothingEnabled = false;
      if (found) pen.drawImage(found, ...place(page.overlay.y, page.overlay.x, page.overlay.height, page.overlay.width));
      pen.imageSmoothingEnabled = true;
    }
    pen.strokeStyle = getComputedStyle(zoom).getPropertyValue("--c2") || "orange";
    pen.lineWidth = 2 * devicePixelRatio;
    for (const box of page.boxes ?? []) pen.strokeRect(...place(box.y, box.x, box.height, box.width));
    canvas.dataset.view = [view.x, view.y, view.scale].map((n) => n.toFixed(4)).join(" ");
  }

  function show(y, x, scale) { // with (y, x) in the middle, as far as the image reaches
    view.scale = Math.min(Math.max(scale, whole), 16 * devicePixelRatio);
    const inside = (middle, size, shown) => (size <= shown ? (size - shown) / 2 : Math.min(Math.max(middle - shown / 2, 0), size - shown));
    view.x = inside(x, page.width, canvas.width / view.scale);
    view.y = inside(y, page.height, canvas.height / view.scale);
    later();
  }

  const middle = () => [view.y + canvas.height / view.scale / 2, view.x + canvas.width / view.scale / 2];

  function scaleBy(factor, px = canvas.width / 2, py = canvas.height / 2) { // what is at (px, py) stays there
    const [y, x] = [view.y + py / view.scale, view.x + px / view.scale];
    const scale = Math.min(Math.max(view.scale * factor, whole), 16 * devicePixelRatio);
    show(y + (canvas.height / 2 - py) / scale, x + (canvas.width / 2 - px) / scale, scale);
  }

  function moveBy(dx, dy) {
    const [y, x] = middle();
    show(y - dy / view.scale, x - dx / view.scale, view.scale);
  }

  function fit() {
    const [y, x] = canvas.dataset.view ? middle() : [page.height / 2, page.width / 2];
    const before = view.scale / whole;
    canvas.width = Math.max(1, canvas.clientWidth * devicePixelRatio);
    canvas.height = Math.max(1, canvas.clientHeight * devicePixelRatio);
    whole = Math.min(canvas.width / page.width, canvas.height / page.height);
    show(y, x, canvas.dataset.view ? before * whole : whole);
  }

  const spot = (event) => [event.offsetX * devicePixelRatio, event.offsetY * devicePixelRatio];
  const spread = () => {
    const [a, b] = [...pointers.values()];
    return Math.hypot(a[0] - b[0], a[1] - b[1]);
  };

  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, spot(event));
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return;
    const wide = pointers.size === 2 && spread();
    const now = spot(event);
    pointers.set(event.pointerId, now);
    if (pointers.size === 1) moveBy(now[0] - before[0], now[1] - before[1]);
    else if (wide) scaleBy(spread() / wide, ...now);
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (event) => pointers.delete(event.pointerId));
  canvas.addEventListener("wheel", (event) => {
    if (document.activeElement !== canvas) return;
    event.preventDefault();
    scaleBy(Math.exp(-event.deltaY / 300), ...spot(event));
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const step = canvas.width / 8;
    const moves = { ArrowLeft: [step, 0], ArrowRight: [-step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] };
    if (moves[event.key]) moveBy(...moves[event.key]);
    else if (event.key === "+" || event.key === "=") scaleBy(1.5);
    else if (event.key === "-") scaleBy(1 / 1.5);
    else if (event.key === "0") show(page.height / 2, page.width / 2, whole);
    else return;
    event.preventDefault();
  });
  for (const button of zoom.querySelectorAll("[data-box]")) {
    button.addEventListener("click", () => {
      const box = page.boxes[button.dataset.box];
      show(box.y + box.height / 2, box.x + box.width / 2, Math.min(canvas.width / box.width, canvas.height / box.height) / 2);
    });
  }
  for (const input of zoom.querySelectorAll("input")) input.addEventListener("change", later);
  fit();
  new ResizeObserver(fit).observe(canvas);
}
