"use strict";
// The live page: every move is a request; while one is under way, only the newest waits.
async function post(name, content) {
  const isFile = content instanceof Blob;
  let answer;
  try {
    answer = await fetch(name, {method: "POST", body: isFile ? content : JSON.stringify(content),
      headers: {"Content-Type": isFile ? "application/octet-stream" : "application/json"}});
  } catch { throw Error("no answer from minivtw.explore; look at its terminal"); }
  const said = await answer.json().catch(() => ({error: "the answer cannot be read"}));
  if (!answer.ok) throw Error(said.error);
  return said;
}

function Lane() {
  let flying = false, waiting = null;
  async function next() {
    if (flying || !waiting) return;
    const now = waiting;
    waiting = null;
    flying = true;
    try { now.done(await post(now.name, now.content)); } catch (error) { now.fail(error); }
    flying = false;
    next();
  }
  return {
    send: (name, content) => new Promise((done, fail) => {
      waiting?.done(null);  // something newer was asked for
      waiting = {name, content, done, fail};
      next();
    }),
    isIdle: () => !flying && !waiting,
  };
}

const lane = Lane(), pictures = Lane(), frames = new Map();
const chosen = {picture: "", question: "What color is the star?", template: "withdraw:layer=K", swap: null, frozen: new Set()};
let layers = 1, rival = "", slow = 0, rest = 0;

const press = (group, picture) => { for (const button of all(`#${group} button`)) button.ariaPressed = button.dataset.picture === picture; };
const failed = message => { find("error").textContent = message; };
const sorted = numbers => [...numbers].sort((a, b) => a - b);
function methodAt(K) {
  const parts = chosen.frozen.size ? [`freeze:layers=${sorted(chosen.frozen).join("/")}`] : [];
  const isEmpty = !chosen.template || (/^freeze:layers=K-\d+$/.test(chosen.template) && K >= layers);
  return parts.concat(isEmpty ? [] : [chosen.template.replace(/\bK\b/g, K)]).join("+");
}
const request = K => ({picture: chosen.picture, question: chosen.question, method: methodAt(K), gone: sorted(wall.state.away), swap: chosen.swap});

async function frameAt(K) {
  const content = request(K), key = JSON.stringify(content);
  if (frames.has(key) && !content.method.includes(".py:")) return frames.get(key);
  const started = performance.now(), frame = await lane.send("frame", content);
  if (!frame) return null;
  slow = performance.now() - started;
  if (frames.size > 500) frames.clear();
  frames.set(key, frame);
  return frame;
}

const wall = Wall({
  paints: true,
  saysMore: true,
  frame: frameAt,
  async eyes(token, frame, K) {
    const eyes = await lane.send("eyes", {...request(K), token, ids: frame.ids});
    return eyes && {...shares(eyes), seen: shares(eyes.seen)};
  },
  away(token, isClick) {
    if (isClick && !find("taking").checked) return false;
    const {away} = wall.state;
    if (!away.delete(token)) away.add(token);
    wall.refresh();
    return true;
  },
  failed,
  drawn(state) {
    const {frame} = state, [share, other] = frame.sides;
    find("owes").textContent = state.away.size ? `${state.away.size} taken away: “${state.full}” has ${percent(share)} left.` : "None is taken away.";
    find("sides").replaceChildren(...(chosen.swap && other !== undefined ? [[state.full, share, ""], [rival, other, "other"]] : []).map(([said, part, kind]) => {
      const bar = make("i");
      bar.style.width = 100 * part + "%";
      return make("div", {className: "side " + kind}, make("b", {textContent: said}), make("span", {}, bar), make("span", {textContent: percent(part)}));
    }));
    find("method-says").textContent = `runs as ${frame.method ?? "the model left alone"}`;
    all("#paint button").forEach((button, layer) => button.ariaPressed = chosen.frozen.has(layer));
    layPaint();
    clearTimeout(rest);
    rest = setTimeout(ahead, 300);
  },
});

// What withdrawal does to the rows is known at once.
wall.state.guess = (K, layer) => {
  const {words, away} = wall.state;
  if (chosen.template !== "withdraw:layer=K") return null;
  return words.map((word, i) => word !== null ? "2" : away.has(i) || layer >= K ? "0" : chosen.frozen.has(layer) ? "1" : "2").join("");
};

// After a pause, the wall's other places are computed, the nearest first.
async function ahead() {
  if (slow > 1500 || !wall.state.movable || !lane.isIdle() || !pictures.isIdle()) return;
  const near = Array.from({length: layers + 1}, (_, K) => K).sort((one, other) => Math.abs(one - wall.state.K) - Math.abs(other - wall.state.K));
  const missing = near.find(K => !frames.has(JSON.stringify(request(K))));
  if (missing === undefined) return;
  const before = JSON.stringify(request(0));
  try { if (await frameAt(missing) && before === JSON.stringify(request(0))) ahead(); } catch { /* said when the wall goes there */ }
}

function layPaint() {
  const rows = all("#paint button"), height = (find("cells").clientHeight - 20) / layers;
  rows.forEach((button, layer) => { button.style.top = layer * height + 11 + "px"; button.style.height = height - 2 + "px"; });
}
function makePaint() {
  find("paint").replaceChildren(...Array.from({length: layers}, (_, layer) => {
    const button = make("button", {textContent: "❄", tabIndex: layer ? -1 : 0, ariaPressed: false, ariaLabel: `freeze the visual tokens in layer ${layer}`});
    button.onclick = () => { if (!chosen.frozen.delete(layer)) chosen.frozen.add(layer); wall.refresh(); };
    button.onkeydown = event => {
      const step = {ArrowUp: -1, ArrowDown: 1}[event.key], other = step && all("#paint button")[layer + step];
      if (!other) return;
      event.preventDefault();
      other.focus();
    };
    return button;
  }));
}

// A newer choice of image or question overtakes an older one.
let asking = 0;
async function ask(edits) {
  const mine = ++asking;
  wall.stop();
  find("wall").ariaBusy = true;
  try {
    const next = {picture: edits.picture ?? chosen.picture, question: edits.question ?? chosen.question};
    const asked = await pictures.send("ask", next);
    if (mine !== asking || !asked) return;
    if (next.picture !== chosen.picture) wall.state.away.clear();
    Object.assign(chosen, next);
    find("question").value = chosen.question;
    forget();
    find("tiles").replaceChildren(...asked.tiles.map((url, i) => make("div", {className: "tile"}, make("img", {src: url, alt: `the image as the model sees it, part ${i + 1}`}))));
    press("samples", chosen.picture);
    failed("");
    await wall.open({words: asked.words, patches: asked.patches, full: asked.full});
  } catch (error) {
    if (mine !== asking) return;
    find("wall").ariaBusy = false;
    failed(error.message);
  }
}

async function upload(file, name = "") {
  try {
    const held = await pictures.send("upload", file);
    if (held) await ask({picture: held.picture});
  } catch (error) { failed((name ? name + ": " : "") + error.message); }
}

function chooseMethod(template) {
  chosen.template = template;
  find("method").value = find("preset").value = template;
  wall.state.movable = /\bK\b/.test(template);
  return wall.refresh();
}

function sampleButtons(samples, choose) {
  return samples.map(sample => {
    const button = make("button", {title: sample.question, onclick: () => choose(sample)}, make("img", {src: sample.small, alt: sample.question}));
    button.dataset.picture = sample.picture;
    return button;
  });
}

async function swapTo(sample, first, stop) {
  try {
    rival = (await post("ask", {picture: sample.picture, question: chosen.question})).full;
  } catch (error) { return failed(error.message); }
  chosen.swap = {other: sample.picture, first, stop};
  find("window").hidden = false;
  press("others", sample.picture);
  return windowMoved();
}
function windowMoved() {
  const {swap} = chosen;
  [swap.first, swap.stop] = [Math.min(swap.first, swap.stop), Math.max(swap.first, swap.stop)];
  find("first").value = swap.first;
  find("stop").value = swap.stop;
  find("first-says").textContent = swap.first;
  find("stop-says").textContent = swap.stop === swap.first ? "none" : `${swap.stop - 1}`;
  return wall.refresh();
}
function forget() {
  chosen.swap = null;
  find("window").hidden = true;
  press("others");
}
function unswap() {
  forget();
  return wall.refresh();
}

// The arithmetic.
function arrayView({name, shape, columns, values, largest}) {
  const signed = new Int8Array(bytes(values)), rows = signed.length / columns, canvas = make("canvas", {width: columns, height: rows});
  const pen = canvas.getContext("2d"), image = pen.createImageData(columns, rows);
  signed.forEach((value, i) => {
    const part = Math.sqrt(Math.abs(value) / 127), end = value < 0 ? [40, 100, 190] : [217, 120, 30];
    image.data.set(value === -128 ? [90, 90, 90, 255] : [...end.map(channel => 255 + (channel - 255) * part), 255], 4 * i);
  });
  pen.putImageData(image, 0, 0);
  canvas.style.width = Math.max(columns * 2, 24) + "px";
  return make("span", {className: "array"}, make("b", {textContent: name}), ` ${shape.join(" × ")}, up to ${largest}`, canvas);
}
function stepView(step) {
  const link = make("a", {href: `source/${step.file}#L${step.line}`, target: "_blank", rel: "noopener", textContent: `${step.file.split("/").at(-1)}:${step.line}`});
  const box = make("details", {}, make("summary", {}, make("code", {textContent: step.source})), make("p", {className: "soft"}, link));
  box.addEventListener("toggle", () => {
    if (!box.open || box.dataset.drawn) return;
    box.dataset.drawn = true;
    box.append(...step.arrays.map(arrayView), ...step.inside.map(calledView));
  });
  return box;
}
const calledView = called => make("div", {}, make("p", {className: "soft"}, make("b", {textContent: called.name + ": "}), called.summary), ...called.steps.map(stepView));
async function unfold(layer = +find("unfold-layer").value) {
  find("unfold-layer").value = layer;
  find("steps").textContent = "computing …";
  try {
    const called = await post("layer", {...request(wall.state.K), layer});
    find("steps").replaceChildren(calledView(called));
  } catch (error) { find("steps").textContent = ""; failed(error.message); }
}

const scene = Scene(blob => upload(blob));

async function begin() {
  const given = await post("start", {}), last = given.layers - 1;
  layers = given.layers;
  find("model").textContent = `${given.model}, ${layers} layers`;
  Object.assign(wall.state, {layers, K: given.layer, layer: Math.max(given.layer - 1, 0)});
  makePaint();
  find("samples").append(...sampleButtons(given.samples, ask));
  find("others").append(...sampleButtons(given.samples, sample => swapTo(sample, 0, wall.state.K)));
  const questions = new Set(["What color is the star?", "Describe the image.", ...given.samples.map(sample => sample.question)]);
  find("questions").append(...[...questions].map(value => make("option", {value})));
  const presets = ["withdraw:layer=K", `freeze:layers=K-${last}`, "fastv:layer=K,keep=0.5", "looked_at:layer=K,keep=0.5", "random:layer=K,keep=0.5", "uniform:layer=K,keep=0.5",
    "fastervlm", "random_tokens:layer=K", "withdraw:layer=K+renumber:layer=K", "adaptive", "", ...(given.own ? [given.own] : [])];
  const summary = spec => spec === given.own ? "as started" : given.methods[spec.split(":")[0]].split(/[:.(]/)[0];
  find("preset").append(...presets.map(value => make("option", {value, textContent: value ? `${value} – ${summary(value)}` : "nothing: the model left alone"})));
  find("preset").onchange = () => chooseMethod(find("preset").value);
  find("choosing").onsubmit = event => { event.preventDefault(); chooseMethod(find("method").value.trim()); };
  find("asking").onsubmit = event => { event.preventDefault(); ask({question: find("question").value}); };
  find("thaw").onclick = () => { chosen.frozen.clear(); wall.refresh(); };
  find("bring").onclick = () => { wall.state.away.clear(); wall.refresh(); };
  find("unfold-layer").append(...Array.from({length: layers}, (_, layer) => make("option", {textContent: layer})));
  find("unfold").onclick = () => unfold();
  find("unswap").onclick = unswap;
  for (const name of ["first", "stop"]) {
    find(name).max = layers;
    find(name).oninput = () => { chosen.swap[name] = +find(name).value; windowMoved(); };
  }
  const take = ([file]) => file && upload(file, file.name);
  find("file").onchange = () => { take(find("file").files); find("file").value = ""; };
  find("draw-open").onclick = () => {
    const opens = find("drawing").hidden;
    find("drawing").hidden = !opens;
    find("draw-open").ariaExpanded = opens;
    if (opens) scene.show();
  };
  addEventListener("dragover", event => event.preventDefault());
  addEventListener("drop", event => {
    event.preventDefault();
    take(event.dataTransfer.files);
  });
  addEventListener("resize", layPaint);
  chosen.template = given.begins;
  find("method").value = find("preset").value = chosen.template;
  wall.state.movable = /\bK\b/.test(chosen.template);
  wall.fromAddress();
  await ask(given.samples[0]);
}
const ready = begin().catch(error => failed(error.message));
