// The page of a video: player and time bar follow each other, links to moments seek, #t=12.4 in the address too.
// What the browser cannot play is stood in for by a strip: pictures of the segments that go by as time does.

const player = document.getElementById("player");
const strip = document.getElementById("strip");
const bar = document.getElementById("bar");
const head = document.getElementById("head");
const hover = document.getElementById("hover");
const duration = Number(document.getElementById("stage").dataset.duration);
const segments = [...bar.querySelectorAll("[data-segment]")].map((rect) => ({
  start: Number(rect.dataset.t),
  number: rect.dataset.segment,
}));

const clock = (seconds) => {
  const whole = Math.floor(seconds);
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60), whole % 60];
  const two = (number) => String(number).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
};

const segmentAt = (time) => segments.findLast((segment) => segment.start <= time) ?? segments[0];
const pictureAt = (time) => {
  const segment = segmentAt(time);
  return segment ? hover.dataset.source + segment.number : null;
};

// --- where time is kept: in the player, or in the strip ---

const film = {
  get time() {
    return player.currentTime;
  },
  seek(time) {
    player.currentTime = Math.min(time, duration);
    if (player.readyState === 0) player.addEventListener("loadedmetadata", () => film.seek(time), { once: true });
  },
  toggle() {
    if (player.paused) player.play().catch(() => {});
    else player.pause();
  },
};

const pictures = {
  time: 0,
  timer: null,
  seek(time) {
    pictures.time = Math.min(Math.max(time, 0), duration);
    const source = pictureAt(pictures.time);
    const picture = document.getElementById("strip-picture");
    if (source && picture.getAttribute("src") !== source) picture.src = source;
    document.getElementById("strip-time").value = pictures.time;
    document.getElementById("strip-clock").textContent = clock(pictures.time);
    show();
  },
  toggle() {
    const button = document.getElementById("strip-play");
    if (pictures.timer) {
      clearInterval(pictures.timer);
      pictures.timer = null;
      button.textContent = "Play";
      return;
    }
    button.textContent = "Pause";
    pictures.timer = setInterval(() => {
      if (pictures.time >= duration) pictures.toggle();
      else pictures.seek(pictures.time + 0.25);
    }, 250);
  },
};

let shown = film;

function show() {
  head.setAttribute("x1", shown.time);
  head.setAttribute("x2", shown.time);
}

function standIn() {
  if (shown === pictures) return;
  const asked = fromAddress() ?? player.currentTime;
  shown = pictures;
  player.hidden = true;
  strip.hidden = false;
  pictures.seek(asked);
}

for (const event of ["timeupdate", "seeking", "seeked"]) player.addEventListener(event, show);
player.addEventListener("error", standIn);
if (player.error) standIn();
// a file of which only the sound can be played has no picture
player.addEventListener("loadeddata", () => player.videoWidth === 0 && standIn());
document.getElementById("strip-play").addEventListener("click", () => pictures.toggle());
document.getElementById("strip-time").addEventListener("input", (event) => pictures.seek(Number(event.target.value)));

// --- moments ---

function fromAddress() {
  const found = /^#t=(\d+(?:\.\d+)?)$/.exec(location.hash);
  return found ? Number(found[1]) : null;
}

function seek(time) {
  history.replaceState(null, "", `#t=${Math.round(time * 1000) / 1000}`);
  shown.seek(time);
}

function pick(place) {
  for (const group of bar.querySelectorAll(".evidence")) group.classList.toggle("on", group.dataset.answer === place);
  for (const button of document.querySelectorAll("[data-pick]"))
    button.setAttribute("aria-pressed", String(button.dataset.pick === place));
}

document.addEventListener("click", (event) => {
  const target = event.target.closest("[data-pick], [data-t], #bar");
  if (!target) return;
  if (target.dataset.pick) return pick(target.dataset.pick);
  event.preventDefault();
  if (target.dataset.answer) pick(target.dataset.answer);
  seek(target === bar ? timeAt(event) : Number(target.dataset.t));
});

addEventListener("hashchange", () => fromAddress() !== null && shown.seek(fromAddress()));
if (fromAddress() !== null) shown.seek(fromAddress());

document.addEventListener("keydown", (event) => {
  if (event.key !== " " || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, textarea, select, button, summary, video, dialog")) return;
  event.preventDefault();
  shown.toggle();
});

// --- pictures on hover ---

function timeAt(event) {
  const box = bar.getBoundingClientRect();
  return (Math.min(Math.max(event.clientX - box.left, 0), box.width) / box.width) * duration;
}

let waiting = null;
bar.addEventListener("pointermove", (event) => {
  if (event.pointerType === "touch") return;
  const [time, box] = [timeAt(event), bar.getBoundingClientRect()];
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    const source = pictureAt(time);
    if (!source) return;
    if (hover.getAttribute("src") !== source) hover.src = source;
    hover.style.left = `${Math.min(Math.max(event.clientX - box.left - 80, 0), Math.max(box.width - 160, 0))}px`;
    hover.hidden = false;
  }, 120);
});
bar.addEventListener("pointerleave", () => {
  clearTimeout(waiting);
  hover.hidden = true;
});
