"use strict";
// Enhancements of pages that work without: keys, dragging, drafts, the time that a page was looked at.
const form = document.getElementById("task-form");
const kind = form.dataset.kind;
const cards = [...form.querySelectorAll(".card")];

// seconds in which the page was visible
let seen = 0;
let since = document.hidden ? null : performance.now();
function addSeen() {
  if (since !== null) seen += performance.now() - since;
  since = document.hidden ? null : performance.now();
}
document.addEventListener("visibilitychange", addSeen);
form.addEventListener("submit", () => {
  addSeen();
  form.elements.seconds.value = (seen / 1000).toFixed(3);
});

// drafts
const state = document.getElementById("draft-state");
let timer = null;
function keepDraft() {
  timer = null;
  const body = new URLSearchParams(new FormData(form));
  fetch("/draft", { method: "POST", body, headers: { Accept: "application/json" }, keepalive: body.toString().length < 60000 })
    .then((response) => { state.textContent = response.ok ? "draft kept" : "draft not kept: " + response.status; })
    .catch(() => { state.textContent = "draft not kept: the server does not answer"; });
}
form.addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(keepDraft, kind === "demonstrate" ? 800 : 1500);
});
document.addEventListener("visibilitychange", () => { if (document.hidden && timer !== null) { clearTimeout(timer); keepDraft(); } });
form.addEventListener("submit", () => clearTimeout(timer));

function choose(name, value) {
  const box = [...form.querySelectorAll("input[type=radio]")].find((each) => each.name === name && each.value === String(value));
  if (!box) return false;
  box.checked = true;
  box.dispatchEvent(new Event("input", { bubbles: true }));
  return true;
}
function placeOf(element) {
  const card = element.closest ? element.closest(".card") : null;
  return card ? Number(card.dataset.place) : null;
}

// keys
let before = null; // what had the focus before the instructions
document.addEventListener("keydown", (event) => {
  const target = event.target;
  const typing = target.matches("textarea, input[type=text]");
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    form.requestSubmit(document.getElementById("submit"));
    return;
  }
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Enter" && !target.matches("button, summary, a, input")) {
    event.preventDefault();
    form.requestSubmit(document.getElementById("submit"));
  } else if (event.key === "s") {
    const skip = document.getElementById("skip");
    skip.open = !skip.open;
    if (skip.open) skip.querySelector("input").focus();
  } else if (event.key === "u") {
    const undo = document.getElementById("undo");
    if (!undo.disabled) undo.form.requestSubmit(undo);
  } else if (event.key === "i") {
    const panel = document.getElementById("instructions");
    panel.open = !panel.open;
    if (panel.open) {
      before = document.activeElement;
      panel.querySelector("summary").focus();
      panel.scrollIntoView({ block: "start" });
    } else if (before) {
      before.focus();
    }
  } else if (event.key === "n" && kind === "rate") {
    answerNo();
  } else if (/^[1-9]$/.test(event.key)) {
    if (kind === "rank") {
      const place = placeOf(document.activeElement);
      if (place !== null) choose("rank-" + place, event.key);
    } else if (kind === "rate") {
      choose("overall", event.key);
    } else if (kind === "compare") {
      choose("preference", ["first", "second", "tie", "both_bad"][event.key - 1]);
    }
  } else if (kind === "rank" && target.matches(".card, body") && /^Arrow/.test(event.key)) {
    const place = placeOf(target);
    const step = event.key === "ArrowDown" || event.key === "ArrowRight" ? 1 : -1;
    const next = place === null ? 0 : Math.min(Math.max(place + step, 0), cards.length - 1);
    event.preventDefault();
    cards[next].focus();
  }
});

// rate: "no" to every question that is still open
function answerNo() {
  for (const box of form.querySelectorAll(".question input[value=no]")) {
    if (!form.querySelector("input[name='" + box.name + "']:checked")) choose(box.name, "no");
  }
}
const allNo = document.getElementById("all-no");
if (allNo) {
  allNo.hidden = false;
  allNo.addEventListener("click", answerNo);
}

// rank: drag an output's name into a bin
const bins = document.getElementById("bins");
if (bins) {
  bins.hidden = false;
  const show = () => {
    for (const bin of bins.querySelectorAll(".bin")) {
      const chips = bin.querySelector(".chips");
      chips.replaceChildren();
      for (const card of cards) {
        const box = form.querySelector("input[name='rank-" + card.dataset.place + "']:checked");
        if (!box || box.value !== bin.dataset.bin) continue;
        const chip = document.createElement("span");
        chip.className = "chip";
        chip.draggable = true;
        chip.dataset.place = card.dataset.place;
        chip.textContent = String.fromCharCode(65 + Number(card.dataset.place));
        chips.append(chip);
      }
    }
  };
  form.addEventListener("input", show);
  show();
  for (const card of cards) {
    const handle = card.querySelector(".handle");
    handle.draggable = true;
    handle.dataset.place = card.dataset.place;
    handle.title = "drag to a number";
  }
  form.addEventListener("dragstart", (event) => {
    if (event.target.dataset && event.target.dataset.place) event.dataTransfer.setData("text/plain", "output " + event.target.dataset.place);
  });
  for (const bin of bins.querySelectorAll(".bin")) {
    bin.addEventListener("dragover", (event) => { event.preventDefault(); bin.classList.add("over"); });
    bin.addEventListener("dragleave", () => bin.classList.remove("over"));
    bin.addEventListener("drop", (event) => {
      event.preventDefault();
      bin.classList.remove("over");
      const match = /^output (\d+)$/.exec(event.dataTransfer.getData("text/plain"));
      if (match) choose("rank-" + match[1], bin.dataset.bin);
    });
  }
  if (cards.length && cards[0].offsetParent !== null) cards[0].focus({ preventScroll: true });
}

// a required choice inside a closed warning: open it, so that the browser can point to it
form.addEventListener("invalid", (event) => {
  for (let panel = event.target.closest("details"); panel; panel = panel.parentElement.closest("details")) panel.open = true;
}, true);
