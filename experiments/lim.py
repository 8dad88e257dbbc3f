import io, torch, numpy as np, denoising_utils as du
from PIL import Image
src=open('/tmp/cells.py').read(); body=src[src.index("LIMITS = r'''")+len("LIMITS = r'''"):]; exec(body[:body.index('\n\n\ntorch.manual')])
blind=du.load_network('dudncnn_blind')[0]
torch.manual_seed(0); g={}
with torch.inference_mode():
    for n,c in du.benchmark_pairs(du.find_photographs(),30,160,subset=range(0,100,20)):
        for k,i in kinds_of_noise(c[0]).items(): g.setdefault(k,[]).append([du.psnr(x,c).item() for x in (i[None],blind(i[None]))])
for k,v in g.items(): print(k,np.mean(v,0).round(2))
