// The document, each token shaded by the share of heads that hold it. Data: the element "views"; no network.
"use strict";
const data = JSON.parse(document.getElementById("views").textContent);
const unpacked = data.views.map(view => Uint8Array.from(atob(view.held), c => c.charCodeAt(0)));
const text = document.querySelector(".document"), readout = document.querySelector(".readout");
const layerChoice = document.querySelector("#layer"), headChoice = document.querySelector("#head");
let shown = 0;

const holds = (place, token, layer, head) => {
  const view = data.views[place], bit = (token * view.layers + layer) * view.heads + head;
  return (unpacked[place][bit >> 3] >> (7 - (bit & 7))) & 1;
};
const range = (choice, size) => choice.value === "all" ? [...Array(size).keys()] : [Number(choice.value)];
const count = token => {
  const view = data.views[shown];
  let held = 0, all = 0;
  for (const layer of range(layerChoice, view.layers))
    for (const head of range(headChoice, view.heads)) { held += holds(shown, token, layer, head); all += 1; }
  return [held, all];
};
// of the layer on show, or where all are: of the most layers
const groups = () => {
  const ffn = data.views[shown].ffn;
  if (layerChoice.value !== "all") return ffn.find(each => each.layers.includes(Number(layerChoice.value)));
  return [...ffn].sort((a, b) => b.layers.length - a.layers.length)[0];
};
const groupOf = (token, own) => {
  if (!own || token < own.head || token >= own.head + own.groups * own.k) return null;
  return Math.floor((token - own.head) / own.k);
};
const draw = () => {
  const own = groups();
  [...text.children].forEach((span, token) => {
    const [held, all] = count(token), group = groupOf(token, own);
    span.style.setProperty("--s", (held / all).toFixed(3));
    span.className = group === null ? "open" : group % 2 ? "odd" : "even";
  });
  const view = data.views[shown];
  document.querySelector("#share").textContent =
    `${view.label}: ${(100 * view.share).toFixed(1)} % of all entries are held` +
    (view.merged ? "; each stands at the last token of its group" : "");
};
const tell = token => {
  const [held, all] = count(token), own = groups(), group = groupOf(token, own);
  let words = `token ${token}: held by ${held} of ${all} heads`;
  if (own) {
    words += group === null ? "; alone in the FFNs" : `; in the FFNs group ${group} of ${own.k} tokens`;
    words += ` (${own.layers.length} layers at k=${own.k})`;
  } else words += "; the FFNs read every token";
  return words;
};
const choices = (select, name, size) => {
  select.replaceChildren(new Option(`all ${name}s`, "all"), ...[...Array(size).keys()].map(i => new Option(`${name} ${i}`, i)));
  select.addEventListener("change", draw);
};
data.pieces.forEach((piece, token) => {
  const span = document.createElement("span");
  span.textContent = piece;
  span.dataset.token = token;
  text.append(span);
});
text.addEventListener("pointerover", event => {
  if (event.target.dataset.token) readout.textContent = tell(Number(event.target.dataset.token));
});
text.addEventListener("click", event => {
  if (event.target.dataset.token) readout.textContent = tell(Number(event.target.dataset.token));
});
choices(layerChoice, "layer", data.views[0].layers);
choices(headChoice, "head", data.views[0].heads);
const radios = document.querySelector("#plugins");
data.views.forEach((view, place) => {
  const label = document.createElement("label"), radio = document.createElement("input");
  radio.type = "radio"; radio.name = "plugin"; radio.value = view.plugin; radio.checked = place === data.start;
  radio.addEventListener("change", () => { shown = place; draw(); });
  label.append(radio, view.label);
  radios.append(label);
});
shown = data.start;
draw();
