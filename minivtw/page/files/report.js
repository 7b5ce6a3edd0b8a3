// The report: everything was computed beforehand.
const data = JSON.parse(find("data").textContent);
const answering = data.words.length - 1;
const wall = Wall({
  frame: K => wall.state.movable ? data.frames[K] : data.own,
  eyes(token, frame) {
    const eyes = data.eyes[token];
    return eyes && {...shares(eyes), readings: token === answering ? frame.readings : null};
  },
  drawn(state) {
    find("drags").hidden = !state.movable;  // there is no wall
    for (const band of all(".band")) band.classList.toggle("chosen", +band.parentNode.dataset.column === state.K);
  },
});
for (const button of all("[data-run]")) button.onclick = () => {
  for (const other of all("[data-run]")) other.ariaPressed = other === button;
  for (const bars of all("[data-bars]")) bars.hidden = bars.dataset.bars !== button.dataset.run;
};
// Numbers where the pointer is; a click on a column moves the wall there.
for (const title of all("svg.chart title")) {
  title.parentNode.dataset.tip = title.textContent;
  title.remove();
}
document.addEventListener("click", event => {
  const column = event.target.closest("[data-column]");
  if (column) wall.move(+column.dataset.column);
});
const own = find("own");
own.hidden = !data.own;
if (data.own) {
  own.textContent = `as asked: ${data.own.method}`;
  own.onclick = () => {
    wall.state.movable = !wall.state.movable;
    own.ariaPressed = !wall.state.movable;
    wall.refresh();
  };
}
own.ariaPressed = data.layer === null;
Object.assign(wall.state, {layers: data.layers, words: data.words, patches: data.patches, movable: data.layer !== null, K: data.layer ?? data.layers});
wall.fromAddress();
wall.open({full: data.frames[data.layers].answer});
