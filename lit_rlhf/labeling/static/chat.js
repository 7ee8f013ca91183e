"use strict";
// Shows responses while they are written; the page works without.
let writing = 0;
for (const box of document.querySelectorAll("[data-stream]")) {
  writing += 1;
  const events = new EventSource(box.dataset.stream);
  events.onmessage = (event) => { box.textContent += JSON.parse(event.data); box.scrollTop = box.scrollHeight; };
  events.addEventListener("end", () => {
    events.close();
    writing -= 1;
    if (writing === 0) location.reload();
  });
}
// the newest is at the end of the page; a message to write is there by its focus
const newest = document.getElementById("vote") || document.querySelector(".cards");
if (newest) newest.scrollIntoView({ block: "nearest" });
document.addEventListener("keydown", (event) => {
  const send = document.getElementById("send");
  const vote = document.getElementById("vote");
  if (send && event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    send.requestSubmit();
  } else if (vote && /^[1-4]$/.test(event.key) && !event.ctrlKey && !event.metaKey && !event.altKey) {
    vote.querySelectorAll("button")[event.key - 1].click();
  }
});
