// The strip of moments: one that is opened plays in its place, from its first second to its last. What the browser
// cannot play opens in the page of its video, where pictures stand in.

let open = null; // the link whose moment plays

function close() {
  if (!open) return;
  open.video.remove();
  open.link.hidden = false;
  open = null;
}

function play(link) {
  close();
  const [start, end] = [Number(link.dataset.start), Number(link.dataset.end)];
  const video = document.createElement("video");
  Object.assign(video, { controls: true, muted: true, playsInline: true, src: link.dataset.play });
  video.setAttribute("aria-label", link.querySelector("img").alt);
  video.addEventListener("loadedmetadata", () => (video.currentTime = start), { once: true });
  video.addEventListener("loadeddata", () => video.videoWidth === 0 && location.assign(link.href));
  video.addEventListener("error", () => location.assign(link.href));
  video.addEventListener("timeupdate", () => {
    if (video.currentTime < end || video.paused) return;
    video.pause();
    video.currentTime = start; // to be played again
  });
  open = { link, video };
  link.hidden = true;
  link.before(video);
  video.focus();
  video.play().catch(() => {});
}

document.addEventListener("click", (event) => {
  const link = event.target.closest("[data-play]");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  play(link);
});

document.addEventListener("keydown", (event) => {
  if (!open) return;
  const { link, video } = open;
  if (event.key === "Escape") {
    close();
    link.focus();
  } else if (event.key === " " && !event.target.closest("input, textarea, select, button, summary, video, dialog")) {
    event.preventDefault();
    if (video.paused) video.play().catch(() => {});
    else video.pause();
  }
});
