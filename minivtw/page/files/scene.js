"use strict";
// The scenes' own drawing, on a canvas: shapes that can be moved, added and recoloured.
const COLORS = {red: [214, 48, 49], green: [39, 174, 96], blue: [41, 98, 215], yellow: [241, 196, 15], purple: [142, 68, 173],
  orange: [230, 126, 34], white: [245, 245, 245], black: [25, 25, 25]};
const SHAPES = ["circle", "square", "triangle", "star", "cross", "ring", "7"];
const STYLE = {inner: 0.45, square: Math.SQRT1_2, base: 0.5, triangle: Math.sqrt(0.75), cross: 0.95, hole: 0.55, digit: 1.6};  // as shares of the radius
const SIDE = 256, LEAST = 20, MOST = 46, MANY = 5;

function corners(shape) {
  if (shape === "square") return [[-1, -1], [1, -1], [1, 1], [-1, 1]].map(([x, y]) => [x * STYLE.square, y * STYLE.square]);
  if (shape === "triangle") return [[0, -1], [STYLE.triangle, STYLE.base], [-STYLE.triangle, STYLE.base]];
  if (shape === "star") return Array.from({length: 10}, (_, i) => {
    const length = i % 2 ? STYLE.inner : 1, angle = Math.PI * i / 5;
    return [length * Math.sin(angle), -length * Math.cos(angle)];
  });
  const end = STYLE.cross, arm = end / 3;
  return [[-arm, -end], [arm, -end], [arm, -arm], [end, -arm], [end, arm], [arm, arm], [arm, end], [-arm, end], [-arm, arm], [-end, arm], [-end, -arm], [-arm, -arm]];
}

function drawThing(pen, {shape, color, x, y, radius}) {
  pen.fillStyle = `rgb(${COLORS[color]})`;
  pen.beginPath();
  if (shape === "circle" || shape === "ring") {
    pen.arc(x, y, radius, 0, 7);
    if (shape === "ring") pen.arc(x, y, radius * STYLE.hole, 0, 7, true);
    pen.fill("evenodd");
  } else if (/\d/.test(shape)) {
    pen.font = `bold ${radius * STYLE.digit / 0.73}px "DejaVu Sans", Arial, Helvetica, sans-serif`;
    pen.textAlign = "center";
    const box = pen.measureText(shape);
    pen.fillText(shape, x, y + (box.actualBoundingBoxAscent - box.actualBoundingBoxDescent) / 2);
  } else {
    for (const [across, down] of corners(shape)) pen.lineTo(x + across * radius, y + down * radius);
    pen.fill();
  }
}

// changed(blob) is told of every new image, as PNG.
function Scene(changed) {
  const canvas = find("scene"), pen = canvas.getContext("2d", {willReadFrequently: true});
  let things = [{shape: "star", color: "red", x: 80, y: 90, radius: 38}, {shape: "circle", color: "blue", x: 180, y: 170, radius: 34}], chosen = 0, held = null;

  function paint(marks = true) {
    pen.fillStyle = "rgb(150,145,148)";
    pen.fillRect(0, 0, SIDE, SIDE);
    for (const thing of things) drawThing(pen, thing);
    if (marks && things[chosen]) {
      const {x, y, radius} = things[chosen];
      pen.strokeStyle = "#000";
      pen.setLineDash([4, 3]);
      pen.strokeRect(x - radius - 3, y - radius - 3, 2 * radius + 6, 2 * radius + 6);
    }
  }

  function show() {
    paint(false);
    canvas.toBlob(changed, "image/png");
    paint();
    const {color, shape} = things[chosen] ?? {color: "no", shape: "shape"};
    find("scene-says").textContent = `${things.length} shapes; chosen: ${color} ${shape}. In training, shapes never touched.`;
    for (const button of all("#shapes button")) button.disabled = things.length >= MANY;
    for (const button of all("#colors button")) button.ariaPressed = color === button.dataset.color;
  }

  function change(edits) {
    const thing = things[chosen];
    if (!thing) return;
    Object.assign(thing, edits);
    thing.radius = within(thing.radius, LEAST, MOST);
    for (const axis of ["x", "y"]) thing[axis] = within(thing[axis], thing.radius, SIDE - thing.radius);
    show();
  }

  function add(shape) {
    const free = [[64, 64], [192, 64], [64, 192], [192, 192], [128, 128]].sort((one, other) => room(other) - room(one))[0];
    const unused = Object.keys(COLORS).find(color => !things.some(thing => thing.color === color));
    things.push({shape, color: unused ?? "red", x: free[0], y: free[1], radius: 30});
    chosen = things.length - 1;
    show();
  }
  const room = ([x, y]) => Math.min(...things.map(thing => Math.hypot(x - thing.x, y - thing.y)), 999);
  const remove = () => { things.splice(chosen, 1); chosen = 0; show(); };

  const at = event => {
    const box = canvas.getBoundingClientRect();
    return {x: (event.clientX - box.left) * SIDE / box.width, y: (event.clientY - box.top) * SIDE / box.height};
  };
  canvas.addEventListener("pointerdown", event => {
    const place = at(event), hit = things.findLastIndex(thing => Math.hypot(place.x - thing.x, place.y - thing.y) < thing.radius + 4);
    if (hit < 0) return;
    chosen = hit;
    held = {x: things[hit].x - place.x, y: things[hit].y - place.y};
    canvas.setPointerCapture(event.pointerId);
    show();
  });
  canvas.addEventListener("pointermove", event => {
    if (!held) return;
    const place = at(event);
    change({x: place.x + held.x, y: place.y + held.y});
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { held = null; });
  canvas.addEventListener("keydown", event => {
    const thing = things[chosen], size = {"+": 4, "-": -4}[event.key];
    const move = {ArrowUp: [0, -6], ArrowDown: [0, 6], ArrowLeft: [-6, 0], ArrowRight: [6, 0]}[event.key];
    if (move && thing) change({x: thing.x + move[0], y: thing.y + move[1]});
    else if (event.key === "n" && things.length) { chosen = (chosen + 1) % things.length; show(); }
    else if (size) grow(size);
    else if (event.key === "Delete") remove();
    else return;
    event.preventDefault();
  });
  find("shapes").append(...SHAPES.map(shape => make("button", {textContent: "+ " + shape, onclick: () => add(shape)})));
  find("colors").append(...Object.entries(COLORS).map(([color, rgb]) => {
    const button = make("button", {className: "swatch", title: color, ariaLabel: color, textContent: "\u00a0", onclick: () => change({color})});
    button.style.background = `rgb(${rgb})`;
    button.dataset.color = color;
    return button;
  }));
  const grow = step => change({radius: things[chosen]?.radius + step});
  find("larger").onclick = () => grow(4);
  find("smaller").onclick = () => grow(-4);
  find("remove").onclick = remove;
  return {show};
}
