"use strict";
// A method that the reader writes runs on the wall, and on the shipped samples one after the other.
const cell = find("cell"), original = cell.value, SAMPLES = 20;
let runs = 0;

function wrongIn(message) {
  find("mine-error").textContent = message;
  const line = +message.match(/line (\d+)/)?.[1];
  if (!line) return;
  const before = cell.value.split("\n").slice(0, line - 1).join("\n").length + (line > 1), end = cell.value.indexOf("\n", before);
  cell.focus();
  cell.setSelectionRange(before, end < 0 ? cell.value.length : end);
}

async function runMine() {
  const run = ++runs, chips = [];
  find("mine-says").textContent = "running …";
  wrongIn("");
  find("mine-samples").replaceChildren();
  try {
    const {template, error} = await post("mine", {text: cell.value});
    if (error) throw Error(error);
    const presets = find("preset");
    if (![...presets.options].some(({value}) => value === template)) presets.append(make("option", {value: template, textContent: `${template} – the cell's`}));
    await chooseMethod(template);
    const wrong = find("error").textContent;
    if (wrong) throw Error(wrong);
    let points = 0, alone = 0, saved = 0;
    const K = wall.state.K, method = methodAt(K), at = wall.state.movable ? `K = ${K}: ` : "";
    for (let sample = 0; sample < SAMPLES; sample++) {
      const one = await post("scored", {sample, method, gone: [], swap: null});
      if (run !== runs) return;
      [points, alone, saved] = [points + one.points, alone + one.alone, saved + 1 - one.flops[0] / one.flops[1]];
      const asked = all("#samples button")[sample + 1], isRight = one.points === 1;
      const chip = make("button", {title: asked.title, className: isRight ? "" : "wrong", onclick: () => { asked.click(); scrollTo({top: 0}); }},
        make("img", {src: asked.firstChild.src, alt: asked.title}), ` ${isRight ? "✓" : "✗"} ${one.answer}` + (isRight ? "" : ` (${one.right})`));
      find("mine-samples").append(chip);
      const count = number => +number.toFixed(1);
      find("mine-says").textContent = `${at}${count(points)} of ${sample + 1} right, with ${percent(saved / (sample + 1))} less arithmetic; `
        + `the model left alone: ${count(alone)}` + (sample + 1 < SAMPLES ? " …" : ".");
    }
  } catch (error) {
    if (run !== runs) return;
    find("mine-says").textContent = "";
    wrongIn(error.message);
  }
}

find("run").onclick = runMine;
find("original").onclick = () => { cell.value = original; };
cell.addEventListener("keydown", event => {
  if (event.key !== "Enter") return;
  const before = cell.value.slice(0, cell.selectionStart).split("\n").at(-1), indent = before.match(/^ */)[0] + (before.endsWith(":") ? "    " : "");
  event.preventDefault();
  if (event.ctrlKey || event.metaKey) runMine();
  else cell.setRangeText("\n" + indent, cell.selectionStart, cell.selectionEnd, "end");
});
STEPS.at(-1).splice(1, 2, "A method gets a layer's index and its tokens and gives back those that go on. Change the one in the cell, and run it: on the wall, and on twenty samples.",
  async () => { await plainly(Math.ceil(layers / 2)); find("mine").scrollIntoView({block: "start"}); cell.focus({preventScroll: true}); });
